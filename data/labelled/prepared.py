"""Whole images made ready for an encoder: one size or each its own, several decoded at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from data.config import MAX_PIXELS
from data.decode import BadImage, centre_box, open_image, to_rgb
from data.errors import DataError
from data.read_ahead import read_ahead

_AHEAD = 128  # images decoded before they are asked for


class PreparationConfig(BaseModel):
    """How an image of any shape becomes one that an encoder takes; bicubic, with antialias.

    EXIF orientation is not applied, as in the published protocols (torchvision's loader).

    Attributes:
        fit: `crop` cuts the centre out; `squash` ignores the aspect; `whole` keeps the aspect and
            the whole image, each side rounded to a multiple of the patch size.
        resolution: (height, width) in pixels, of `whole` the short side is the smaller one; None
            for the encoder's native one.
        crop_ratio: of `crop`, the share of the largest centred box that is kept: 1 in RADIO's
            protocol, 0.875 in DINO's (short side 256, of it 224).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fit: Literal["crop", "squash", "whole"] = "crop"
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    crop_ratio: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _crops_only_where_it_says_so(self) -> Self:
        if self.fit != "crop" and self.crop_ratio != 1:
            raise ValueError(f"crop_ratio: fit {self.fit!r} crops nothing; leave it at 1")
        return self


class ImagePreparation:
    """Makes images ready for one encoder.

    Args:
        config: how.
        resolution: (height, width) in pixels, what `config.resolution` stands for.
        patch_size: pixels that both sides are rounded to where the aspect is kept.
    """

    def __init__(
        self, config: PreparationConfig, resolution: tuple[int, int], patch_size: int
    ) -> None:
        self.config, self.resolution, self.patch_size = config, resolution, patch_size

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """The pixels of an image file, uint8 (H, W, 3), RGB.

        Raises:
            DataError: the bytes are no image; names it.
        """
        try:
            image = to_rgb(open_image(data, MAX_PIXELS))
        except Exception as error:  # Pillow's plugins raise exceptions of many types
            raise DataError(f"the image '{name}': {error}") from error
        height, width = self.size(image.height, image.width)
        box = (0.0, 0.0, float(image.width), float(image.height))
        if self.config.fit == "crop":
            box = self._centre(image.height, image.width)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in pixels that an image of this one becomes."""
        if self.config.fit != "whole":
            return self.resolution
        scale, patch = min(self.resolution) / min(height, width), self.patch_size
        sides = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
        return sides[0], sides[1]

    def _centre(self, height: int, width: int) -> tuple[float, float, float, float]:
        box = centre_box(height, width, self.resolution[1] / self.resolution[0])
        inset = (1 - self.config.crop_ratio) / 2
        x, y = inset * (box[2] - box[0]), inset * (box[3] - box[1])
        return box[0] + x, box[1] + y, box[2] - x, box[3] - y


def read_prepared(
    names: Sequence[str], read: Callable[[str], bytes], prepare: ImagePreparation
) -> Iterator[np.ndarray]:
    """The pixels of images in the order of their names, decoded in threads ahead of their use.

    Args:
        names: of the images.
        read: the bytes of one; called from several threads.
        prepare: what happens to each.

    Raises:
        DataError: an image cannot be read or used.
    """

    def job(name: str) -> np.ndarray:
        try:
            data = read(name)
        except (BadImage, OSError) as error:
            raise DataError(f"the image '{name}': {error}") from error
        return prepare(data, name)

    return read_ahead(job, names, ahead=_AHEAD)
