"""Sizes and factors of recipes, and the resizing that every upsampler uses."""

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import BeforeValidator, PositiveInt
from torch import Tensor


def _both_axes(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"expected a whole number or a pair [height, width], got {value!r}")
    return value


# (height, width); a recipe may give one number for both.
Size2d = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_both_axes)]
Factor = Size2d  # how many times denser a map becomes, per axis


def scaled(size: tuple[int, int], factor: tuple[int, int]) -> tuple[int, int]:
    """(factor[0] * height, factor[1] * width), in pixels or in cells."""
    return factor[0] * size[0], factor[1] * size[1]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (B, D, H, W) bilinearly, half-pixel centres, antialiased along axes that shrink."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def enlarge(maps: Tensor, factor: tuple[int, int]) -> Tensor:
    """Interpolates (B, D, h, w) bilinearly, half-pixel centres, to (B, D, fh * h, fw * w)."""
    size = scaled((maps.shape[-2], maps.shape[-1]), factor)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
