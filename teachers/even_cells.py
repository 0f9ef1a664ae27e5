"""Moves the cells of a CNN's map to where an even division of the image has them.

Upsamplers, and routes that resize maps, take cells as tiles of the image; those of a CNN that pads
lie elsewhere, see `FeatureSpec.frame`. Moving them interpolates, so what can use the frame itself
(dense probes, keypoints) takes the map as it is.
"""

import torch
from torch import Tensor

from teachers.features import Features, FeatureSpec, Frame
from teachers.teacher import Teacher
from teachers.upsamplers.upsampler import Encode


def even_encoder(teacher: Teacher) -> Encode:
    """An encoder whose cells tile the image; the teacher itself if they do so already."""
    if teacher.spec.padding is None:
        return teacher

    def encode(images: Tensor) -> Features:
        features = teacher(images)
        size = (images.shape[-2], images.shape[-1])
        return features._replace(spatial=lay_evenly(features.spatial, teacher.spec, size))

    return encode


def lay_evenly(maps: Tensor, spec: FeatureSpec, size: tuple[int, int]) -> Tensor:
    """Interpolates maps (B, D, h, w) at the centres of h x w equal parts of the image.

    Args:
        maps: of images of (height, width) pixels, `size`.
        spec: of their encoder.
        size: in pixels.

    Returns:
        (B, D, h, w); bilinear, and beyond the outer centres the outer cells.
    """
    frame = spec.frame(*size)
    if frame == Frame(*size):
        return maps
    begins = frame.top, frame.left
    rows, columns = (
        cell_weights(maps, axis, frame[axis], begins[axis], size[axis] / maps.shape[2 + axis])
        for axis in (0, 1)
    )
    return rows @ maps @ columns.T


def cell_weights(
    maps: Tensor, axis: int, length: float, begin: float, pitch: float, count: int | None = None
) -> Tensor:
    """The weight of each cell along an axis for each of some points, (points, cells).

    Args:
        maps: (B, D, h, w); for the number of cells, the type and the device.
        axis: 0 vertical, 1 horizontal.
        length: in pixels that the cells cover.
        begin: where they begin, in pixels.
        pitch: pixels between two points, the first of which is at half of it.
        count: number of points; None for one a cell.
    """
    cells = maps.shape[2 + axis]
    numbers = torch.arange(cells, dtype=maps.dtype, device=maps.device)
    points = torch.arange(count or cells, dtype=maps.dtype, device=maps.device)
    place = (((points + 0.5) * pitch - begin) * cells / length - 0.5).clamp(0, cells - 1)
    return (1 - (place[:, None] - numbers).abs()).clamp(min=0)
