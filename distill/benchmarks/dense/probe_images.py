"""How images of a data set reach a frozen encoder, and predictions the pixels of the truth."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.benchmarks.dense.pixel_samples import LabelledPixels
from teachers.teacher import Teacher


class ProbeImages(ABC):
    """Training views and test images of a set, for one encoder.

    Attributes:
        encoder: frozen, on this process's device.
        dims: channels of each map that `encode` returns.
        size: (height, width) in pixels of the truth of every training view.
        protocol: the entries of `Measurement.protocol` that are decided here.
        size_keys: the recipe's keys that bring training images to one size.
    """

    encoder: Teacher
    dims: Sequence[int]
    size: tuple[int, int]
    protocol: dict[str, Any]
    size_keys: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """The number of training views."""

    @abstractmethod
    def key(self, number: int) -> str:
        """The name of a training view's image, for messages."""

    @abstractmethod
    def view(self, number: int, generator: torch.Generator | None) -> LabelledPixels:
        """A training view, the image at the size that is encoded.

        Args:
            number: of the view.
            generator: of the augmentation; None for a view that is cached.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) in [0, 1] to the maps that a head takes."""

    @abstractmethod
    def on_pixels(self, predicted: Tensor, stride: int) -> Tensor:
        """Predictions (B, K, h, w) for training views, at every n-th pixel of their truth."""

    @abstractmethod
    def test(self, sample: Any) -> LabelledPixels:
        """A test image as it is stored, and its truth on the grid that is counted."""

    @abstractmethod
    def predict(
        self, heads: Sequence[nn.Module], image: Tensor, size: tuple[int, int]
    ) -> list[Tensor]:
        """Decoded predictions for a test image.

        Args:
            heads: trained.
            image: (3, H, W) in [0, 1], as it is stored.
            size: (height, width) of the predictions.

        Returns:
            (C, height, width) for each head, on the encoder's device.
        """
