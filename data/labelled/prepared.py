"""Preparation of whole images for an encoder, decoded in several threads."""

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
    """Resizing of images to the input of an encoder: bicubic, with antialias.

    EXIF orientation is not applied, as in the published protocols (torchvision's loader).

    Attributes:
        fit: `crop` takes the centre; `squash` changes the aspect ratio; `whole` keeps the aspect
            ratio and the whole image, each side rounded to a multiple of the patch size.
        resolution: (height, width) in pixels; for `whole` its smaller value is that of the short
            side. None for the encoder's native resolution.
        crop_ratio: for `crop`, the side of the crop as a share of the largest centred box: 1 in
            RADIO's protocol, 0.875 in DINO's (224 of a short side of 256).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fit: Literal["crop", "squash", "whole"] = "crop"
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    crop_ratio: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _ratio_needs_a_crop(self) -> Self:
        if self.fit != "crop" and self.crop_ratio != 1:
            raise ValueError(f"crop_ratio: needs fit 'crop', got fit {self.fit!r}")
        return self


class ImagePreparation:
    """Prepares images for one encoder.

    Args:
        config: of the preparation.
        resolution: (height, width) in pixels; `config.resolution` or the encoder's own.
        patch_size: for `whole`, pixels whose multiples sides are rounded to.
    """

    def __init__(
        self, config: PreparationConfig, resolution: tuple[int, int], patch_size: int
    ) -> None:
        self.config, self.resolution, self.patch_size = config, resolution, patch_size

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """The pixels of an image file, uint8 (H, W, 3), RGB; DataError names a bad file."""
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
        """The (height, width) in pixels after preparation of an image of (height, width)."""
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
    """The pixels of images in the order of `names`, decoded in threads ahead of their use.

    Args:
        read: returns the bytes of an image; called from several threads.

    Raises:
        DataError: an image cannot be read.
    """

    def job(name: str) -> np.ndarray:
        try:
            data = read(name)
        except (BadImage, OSError) as error:
            raise DataError(f"the image '{name}': {error}") from error
        return prepare(data, name)

    return read_ahead(job, names, ahead=_AHEAD)
