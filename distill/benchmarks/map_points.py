"""Features at points of an image, and the points that the cells of a map stand for.

Points are (x, y) in pixels, (0, 0) the outer corner of the first pixel; a cell stands for its
centre (half-pixel centres). Mixing this with corners moves matches by half a cell.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import FeatureSpec


def encoder_size(spec: FeatureSpec, asked: tuple[int, int] | Literal["native"]) -> tuple[int, int]:
    """The (height, width) in pixels that an encoder is given: what was asked, or its native size.

    Raises:
        TeacherError: it takes one size only, another one.
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
    features: Tensor, covers: tuple[int, int], points: Tensor, mode: Literal["bilinear", "bicubic"]
) -> Tensor:
    """Features at points; with the points of a grid, the map resized to that grid.

    Args:
        features: (D, h, w).
        covers: (height, width) in pixels that the map covers, as of `DenseMap`.
        points: (N, 2) as x, y in pixels of the encoded image, on the map's device.
        mode: of interpolation; beyond the outer cells' centres their values are kept.

    Returns:
        (N, D).
    """
    size = points.new_tensor((covers[1], covers[0]))
    where = (2 * points / size - 1).to(features.dtype)
    sampled = F.grid_sample(
        features[None], where[None, None], mode, padding_mode="border", align_corners=False
    )
    return sampled[0, :, 0].T


def cell_centres(grid: tuple[int, int], covers: tuple[int, int]) -> Tensor:
    """The points, float64 (h * w, 2) as x, y, that the cells of a map stand for, row by row."""
    rows, columns = (
        (torch.arange(cells, dtype=torch.float64) + 0.5) * pixels / cells
        for cells, pixels in zip(grid, covers, strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
