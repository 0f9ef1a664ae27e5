"""Feature maps of images of any size, by padding, and their enlargement to pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.errors import TeacherError
from teachers.even_cells import cell_weights
from teachers.features import FeatureSpec, Frame
from teachers.teacher import Teacher


class DenseMap(NamedTuple):
    """The feature map of a batch of images.

    Attributes:
        features: (B, D, h, w).
        covers: the pixels that the map covers: the images and their padding, unless the encoder
            places its cells otherwise.
    """

    features: Tensor
    covers: Frame


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
    return DenseMap(encoder(padded).spatial, encoder.spec.frame(*padded.shape[-2:]))


def dense_layers(encoder: Teacher, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The maps of some layers, of images padded as by `dense_map`; all cover `padded_size`.

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
    whole = height % spec.patch_size == 0 and width % spec.patch_size == 0
    if (height, width) == spec.resolution or (whole and spec.accepts(height, width)):
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


def covered(spec: FeatureSpec, height: int, width: int) -> Frame:
    """`DenseMap.covers` of images of (height, width) pixels.

    Raises:
        TeacherError: see `padded_size`.
    """
    return spec.frame(*padded_size(spec, height, width))


def to_pixels(
    maps: Tensor,
    covers: Frame,
    size: tuple[int, int],
    stride: int = 1,
    resized: tuple[int, int] | None = None,
) -> Tensor:
    """Enlarges maps to pixels and crops the padding.

    Args:
        maps: (B, K, h, w) on the encoder's grid.
        covers: as of `DenseMap`.
        size: (H, W) of the images in pixels.
        stride: compute only every n-th pixel along both axes, starting at n // 2.
        resized: (H, W) in pixels that the images' pixels are then resized to; None for no change.

    Returns:
        (B, K, H, W), bilinear with half-pixel centres; (B, K, H', W') of the pixels of a stride.
    """
    tiled = covers.top == covers.left == 0 and size[0] <= covers.height and size[1] <= covers.width
    if stride == 1 and resized is None and tiled:
        whole = int(covers.height), int(covers.width)
        dense = F.interpolate(maps, whole, mode="bilinear", align_corners=False)
        return dense[..., : size[0], : size[1]]
    begins = covers.top, covers.left
    rows, columns = (
        _weights(maps, axis, covers[axis], begins[axis], size[axis]) for axis in (0, 1)
    )
    if resized is not None:
        rows, columns = (_resized(rows, resized[0]), _resized(columns, resized[1]))
    return rows[stride // 2 :: stride] @ maps @ columns[stride // 2 :: stride].T


def _weights(maps: Tensor, axis: int, length: float, begin: float, kept: int) -> Tensor:
    """The weight of each cell along an axis for each pixel, (pixels, cells).

    Args:
        maps: (B, K, h, w).
        axis: 0 vertical, 1 horizontal.
        length: in pixels that all cells cover.
        begin: where they begin, in pixels.
        kept: pixels of the image.
    """
    if begin != 0 or kept > length:
        return cell_weights(maps, axis, length, begin, 1, kept)
    unit = torch.eye(maps.shape[2 + axis], dtype=maps.dtype, device=maps.device)
    unit = F.interpolate(unit[None], int(length), mode="linear", align_corners=False)[0]
    return unit[:, :kept].T


def _resized(weights: Tensor, length: int) -> Tensor:
    """Weights (pixels, cells) for pixels that are resized bilinearly to another number."""
    resized = F.interpolate(weights.T[None], length, mode="linear", align_corners=False)
    return resized[0].T
