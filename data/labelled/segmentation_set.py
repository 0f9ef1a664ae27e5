"""What every segmentation set is, read from files or made here."""

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from data.labelled.layout import Split


class PixelSample(NamedTuple):
    """One image and its label map, as files.

    Attributes:
        image: the picture.
        target: the label map.
        key: the name that messages and pictures use.
    """

    image: Path
    target: Path
    key: str


class SegmentationSet(BaseModel):
    """Images whose every pixel has a class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""

    @abstractmethod
    def samples(self, split: Split) -> list[PixelSample]:
        """The images of a split, in an order that does not change.

        Raises:
            DataError: files are missing; shows the expected tree.
        """

    @abstractmethod
    def read(self, sample: PixelSample) -> tuple[np.ndarray, np.ndarray]:
        """Reads an image and its labels.

        Returns:
            uint8 (H, W, 3), RGB, and uint8 (H, W), 255 where ignored.

        Raises:
            DataError: a file cannot be read, the sizes differ, or a number is no class.
        """
