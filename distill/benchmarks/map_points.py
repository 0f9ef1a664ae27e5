"""Features at points of an image, and the centres of a map's cells.

Points are (x, y) in pixels; (0, 0) is the outer corner of the first pixel. The feature of a cell
belongs to the cell's centre (half-pixel centres).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import FeatureSpec, Frame


def encoder_size(spec: FeatureSpec, asked: tuple[int, int] | Literal["native"]) -> tuple[int, int]:
    """The (height, width) in pixels of an encoder's input: `asked`, or its native size.

    Raises:
        TeacherError: the encoder takes only one size, and another was asked.
    """
    if asked == "native":
        return spec.resolution
    if asked == spec.resolution or spec.any_resolution:
        return asked
    raise TeacherError(
        f"size: {asked[0]} x {asked[1]} px: this encoder takes {spec.resolution[0]} x "
        f"{spec.resolution[1]} px only; size=native gives every encoder its native size"
    )


def sample_map(
    features: Tensor, covers: Frame, points: Tensor, mode: Literal["bilinear", "bicubic"]
) -> Tensor:
    """Interpolates a map at points.

    Args:
        features: (D, h, w).
        covers: the pixels that the map covers, as of `DenseMap`.
        points: (N, 2) as x, y in pixels of the encoded image, on the map's device.
        mode: of interpolation; beyond the centres of the outer cells, their values are repeated.

    Returns:
        (N, D).
    """
    size = points.new_tensor((covers.width, covers.height))
    begin = points.new_tensor((covers.left, covers.top))
    where = (2 * (points - begin) / size - 1).to(features.dtype)
    sampled = F.grid_sample(
        features[None], where[None, None], mode, padding_mode="border", align_corners=False
    )
    return sampled[0, :, 0].T


def cell_centres(grid: tuple[int, int], covers: Frame) -> Tensor:
    """The centres of a map's cells, row by row, float64 (h * w, 2) as x, y in pixels."""
    rows, columns = (
        (torch.arange(cells, dtype=torch.float64) + 0.5) * pixels / cells + begin
        for cells, pixels, begin in zip(grid, covers[:2], covers[2:], strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
