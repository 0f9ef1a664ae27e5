"""Feature maps of images of any size, by padding, and their enlargement to pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.teacher import Teacher


class DenseMap(NamedTuple):
    """The feature map of a batch of images.

    Attributes:
        features: (B, D, h, w).
        covers: (height, width) in pixels that the map covers: the images and their padding.
    """

    features: Tensor
    covers: tuple[int, int]


def dense_map(encoder: Teacher, images: Tensor) -> DenseMap:
    """Encodes images, padded to a size that the encoder takes.

    Padding repeats the last row and column, up to the next multiple of the patch size.

    Args:
        encoder: frozen.
        images: (B, 3, H, W) in [0, 1].

    Raises:
        TeacherError: the encoder takes only one size, and the images have another.
    """
    padded = _padded(encoder, images)
    return DenseMap(encoder(padded).spatial, (padded.shape[-2], padded.shape[-1]))


def dense_layers(encoder: Teacher, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The maps of some layers, of images padded as by `dense_map`; all cover the same pixels.

    Args:
        encoder: frozen.
        images: (B, 3, H, W) in [0, 1].
        indices: of the layers, see `Teacher.layers`.

    Raises:
        TeacherError: the encoder takes only one size, and the images have another; or it has no
            such layers.
    """
    return encoder.layers(_padded(encoder, images), indices)


def _padded(encoder: Teacher, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    covers = padded_size(encoder.spec, height, width)
    return F.pad(images, (0, covers[1] - width, 0, covers[0] - height), mode="replicate")


def padded_size(spec: FeatureSpec, height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels that images are padded to for an encoder.

    Raises:
        TeacherError: the encoder takes only one size, and the images have another.
    """
    if spec.accepts(height, width):
        return height, width
    if not spec.any_resolution:
        h, w = spec.resolution
        raise TeacherError(
            f"images of {height} x {width} px: this encoder takes {h} x {w} px only; resize "
            f"them, input.size=[{h},{w}], or slide windows over them, input.crop=[{h},{w}] and "
            "input.stride"
        )
    p = spec.patch_size
    return -(-height // p) * p, -(-width // p) * p


def to_pixels(
    maps: Tensor,
    covers: tuple[int, int],
    size: tuple[int, int],
    stride: int = 1,
    resized: tuple[int, int] | None = None,
) -> Tensor:
    """Enlarges maps to pixels and crops the padding.

    Args:
        maps: (B, K, h, w) on the encoder's grid.
        covers: (height, width) in pixels, as of `DenseMap`.
        size: (H, W) of the images in pixels, at most `covers`.
        stride: compute only every n-th pixel along both axes, starting at n // 2.
        resized: (H, W) in pixels that the images' pixels are then resized to; None for no change.

    Returns:
        (B, K, H, W), bilinear with half-pixel centres; (B, K, H', W') of the pixels of a stride.
    """
    if stride == 1 and resized is None:
        dense = F.interpolate(maps, covers, mode="bilinear", align_corners=False)
        return dense[..., : size[0], : size[1]]
    steps = [(covers, size), *([] if resized is None else [(resized, resized)])]
    rows, columns = (
        _weights(maps, axis, [(length[axis], kept[axis]) for length, kept in steps])
        for axis in (0, 1)
    )
    return rows[stride // 2 :: stride] @ maps @ columns[stride // 2 :: stride].T


def _weights(maps: Tensor, axis: int, steps: Sequence[tuple[int, int]]) -> Tensor:
    """The weight of each cell along an axis for each pixel, (pixels, cells).

    Args:
        maps: (B, K, h, w).
        axis: 0 vertical, 1 horizontal.
        steps: for each resizing its length in pixels, and how many of them are kept.
    """
    unit = torch.eye(maps.shape[2 + axis], dtype=maps.dtype, device=maps.device)[None]
    for length, kept in steps:
        unit = F.interpolate(unit, length, mode="linear", align_corners=False)[..., :kept]
    return unit[0].T
