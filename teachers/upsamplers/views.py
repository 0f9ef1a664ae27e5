"""Random views of an image for consistency training, as warps of both pixels and maps.

A view is a homography from the view's coordinates to those of the base image. Coordinates run from
-1, the left or upper edge, to 1, the right or lower edge; cell i of n has its centre at
(2i + 1) / n - 1. A homography thus applies at every resolution. After FeatSharp (arXiv 2502.16025).
The data stream makes the base image by a random resized crop.

The paper's views show nearly the whole base, so an upsampled map that looks like the encoder's map
of the whole image satisfies them: detail that the encoder sees only when it looks closer, as in
tiles, is not rewarded. Close-ups, which are not in the paper, show a part of the base.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from teachers.config import StrictConfig
from teachers.upsamplers.precision import at_least_float32
from teachers.upsamplers.resize import resize, scaled

_CORNER_REACH = 0.45  # share of a side; at half a side two corners could meet


class ViewsConfig(StrictConfig):
    """Ranges of the random views; the defaults are the paper's.

    Attributes:
        num_views: views of each image.
        close_ups: how many of them, the last ones, show a part of the base: a window at a random
            place, magnified by 1 up to the upsampler's factor, and warped as the other views are.
        zoom: magnification, log-uniform in [1 / zoom, zoom].
        perspective: [least, largest] standard deviation of the shift of each corner, as a share of
            the side, drawn uniformly.
        rotation_degrees: rotation about the centre, uniform in [-x, x].
        shift_cells: step of the random shift, in cells of the high-resolution grid. The shift
            stays within the bounding box of the view after perspective and rotation.
    """

    num_views: PositiveInt = 5
    close_ups: NonNegativeInt = 0
    zoom: Annotated[float, Field(ge=1, le=4)] = 1 / 0.95
    perspective: tuple[
        Annotated[float, Field(ge=0, le=0.1)], Annotated[float, Field(ge=0, le=0.1)]
    ] = (0.01, 0.05)
    rotation_degrees: Annotated[float, Field(ge=0, le=45)] = 5.0
    shift_cells: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> "ViewsConfig":
        if self.perspective[0] > self.perspective[1]:
            raise ValueError(
                f"perspective: expected [least, largest], got {list(self.perspective)}"
            )
        if self.close_ups > self.num_views:
            raise ValueError(
                f"close_ups: {self.close_ups} of {self.num_views} views; raise num_views, which "
                "counts them too"
            )
        return self

    def magnifications(self, closest: float) -> list[float]:
        """About how large each view shows the base, the mean of its range on a log scale.

        Close-ups share the range from 1 to `closest` in equal parts, so that every image is seen
        from everywhere between, and so that the resolution that each view needs is known.

        Args:
            closest: the largest magnification, the upsampler's factor.
        """
        count = self.close_ups
        return [1.0] * (self.num_views - count) + [
            closest ** ((i + 0.5) / count) for i in range(count)
        ]


def sample_homographies(
    config: ViewsConfig,
    batch: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    *,
    closest: float = 1.0,
) -> Tensor:
    """Draws views: zoom, shifts of the corners, rotation, and a shift of the whole.

    Close-ups are such views of a window of the base.

    Args:
        config: the ranges.
        batch: number of images B.
        grid: (H, W) cells of the high-resolution map, for the unit of shifts and the aspect ratio,
            without which the rotation of a rectangle would be a shear.
        generator: on the CPU, so that every device draws the same views.
        closest: the largest magnification of close-ups.

    Returns:
        (B, n, 3, 3) float64, on the CPU: view coordinates to base coordinates, with [2, 2] = 1.
    """
    homographies = _jitter(config, batch, grid, generator)
    if config.close_ups:
        windows = _windows(config.close_ups, batch, closest, generator)
        rest = config.num_views - config.close_ups
        homographies[:, rest:] = windows @ homographies[:, rest:]
    return homographies / homographies[..., 2:, 2:]


def _jitter(
    config: ViewsConfig, batch: int, grid: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """The published views, up to the scale of their matrices."""
    shape, double = (batch, config.num_views), torch.float64
    drawn = torch.rand(*shape, 5, dtype=double, generator=generator)
    zoom = config.zoom ** (2 * drawn[..., 0] - 1)
    least, largest = config.perspective
    std = least + (largest - least) * drawn[..., 1]
    angle = math.radians(config.rotation_degrees) * (2 * drawn[..., 2] - 1)
    side = torch.tensor([grid[1], grid[0]], dtype=double)

    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=double) * side / 2
    moves = torch.randn(*shape, 4, 2, dtype=double, generator=generator) * std[..., None, None]
    moved = corners + moves.clamp(-_CORNER_REACH, _CORNER_REACH) * side
    low, high = moved.amin(-2), moved.amax(-2)
    centre, extent = (low + high) / 2, high - low

    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    frame = cos * extent + sin.abs() * extent.flip(-1)
    room = (frame - side).clamp(min=0)
    steps = (room / config.shift_cells).floor() + 1
    shift = (drawn[..., 3:] * steps).floor() * config.shift_cells - room / 2

    turned = torch.zeros(*shape, 3, 3, dtype=double)
    turned[..., :2, :2] = torch.stack(
        [torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)], dim=-2
    )
    turned[..., 2, 2] = 1
    cells = torch.diag(torch.cat([side / 2, side.new_ones(1)]))
    unzoom = torch.diag_embed(torch.stack([1 / zoom, 1 / zoom, torch.ones_like(zoom)], -1))
    back = unzoom @ _between(moved, corners) @ _translation(centre) @ turned @ _translation(shift)
    return cells.inverse() @ back @ cells


def _windows(count: int, batch: int, closest: float, generator: torch.Generator) -> Tensor:
    """Random windows inside the base, (batch, count, 3, 3): a window's coordinates to the base's.

    Window i is smaller than the base by closest^(i / count) to closest^((i + 1) / count).
    """
    drawn = torch.rand(batch, count, 3, dtype=torch.float64, generator=generator)
    share = closest ** -((torch.arange(count) + drawn[..., 0]) / count)
    windows = torch.diag_embed(torch.stack([share, share, torch.ones_like(share)], -1))
    windows[..., :2, 2] = (2 * drawn[..., 1:] - 1) * (1 - share)[..., None]
    return windows


def warp(maps: Tensor, homographies: Tensor, size: tuple[int, int]) -> Tensor:
    """Warps maps to views, bilinearly with half-pixel centres.

    Outside of the base the map is mirrored at its edges; `valid_mask` marks those cells.

    Args:
        maps: (N, D, H, W).
        homographies: (N, 3, 3), float32 or float64, on the same device.
        size: (h, w) of the view.

    Returns:
        (N, D, h, w), float32, or float64 for float64 maps.
    """
    exact = at_least_float32(maps)
    places = _places(homographies, size)[0].to(exact)
    return F.grid_sample(
        exact, places, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def bilinear_taps(homographies: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The four base cells, and their weights, that each cell of a view is interpolated from.

    `warp` to the map's own size (H, W), with homographies (N, 3, 3), is the sum of these.

    Returns:
        Row-major indices of the cells, int32, and their weights, which sum to one and have the
        dtype of the homographies; both (N, 4, H, W).
    """
    places = _places(homographies, size)[0]
    cells, shares = [], []
    for place, length in zip(places.unbind(-1), size[::-1], strict=True):
        position = ((place + 1) * length - 1) / 2
        low = position.floor()
        pair = torch.stack([low, low + 1], dim=1).int() % (2 * length)
        # Mirroring at both edges has a period of two maps.
        cells.append(torch.where(pair < length, pair, 2 * length - 1 - pair))
        shares.append(torch.stack([1 - (position - low), position - low], dim=1))
    (x, y), (share_x, share_y) = cells, shares
    taps = y[:, :, None] * size[1] + x[:, None]
    return taps.flatten(1, 2), (share_y[:, :, None] * share_x[:, None]).flatten(1, 2)


def warp_images(
    images: Tensor,
    homographies: Tensor,
    size: tuple[int, int],
    magnifications: Sequence[float] = (),
) -> Tensor:
    """Warps images to all views of a batch, antialiased.

    Along an axis where the base is larger than the view, the base is first resized, with antialias,
    to at most twice the view; the view is sampled at twice its size and averaged over pairs of
    samples, against aliasing by the warp itself. Elsewhere this would blur, so each pixel is
    sampled once. Outside of the base the image is mirrored: with global attention, a black border
    would change the encoder's features of the valid cells too.

    A view that shows the base magnified shows a smaller part of it, so there the base is compared
    with the view times the nearest power of two of its magnification.

    Args:
        images: (B, 3, H, W) in [0, 1].
        homographies: (B, n, 3, 3), on the same device.
        size: (h, w) of the views in pixels.
        magnifications: of the n views, see `ViewsConfig.magnifications`; none for 1 each.

    Returns:
        (B * n, 3, h, w) in [0, 1], the views of an image one after another.
    """
    levels = [max(round(math.log2(each)), 0) for each in magnifications]
    if not any(levels):
        return _warp_level(images, homographies, size, 1)
    views = images.new_empty(*homographies.shape[:2], images.shape[1], *size)
    for level in sorted(set(levels)):
        members = [i for i, each in enumerate(levels) if each == level]
        seen = _warp_level(images, homographies[:, members], size, 2**level)
        views[:, members] = seen.unflatten(0, (len(images), len(members)))
    return views.flatten(0, 1)


def _warp_level(
    images: Tensor, homographies: Tensor, size: tuple[int, int], magnification: int
) -> Tensor:
    """`warp_images` for views of one magnification."""
    num_views = homographies.shape[1]
    height, width = images.shape[-2:]
    whole = scaled(size, (magnification, magnification))  # a base as fine as the view
    samples = (1 if height <= whole[0] else 2, 1 if width <= whole[1] else 2)
    dense = scaled(size, samples)
    full = scaled(whole, samples)
    base = resize(images, (min(height, full[0]), min(width, full[1])))
    places = _places(homographies.flatten(0, 1), dense)[0].to(base)
    # All views of an image in one sampling grid, below each other, to avoid copies of the base.
    places = rearrange(places, "(b n) h w xy -> b (n h) w xy", n=num_views)
    views = F.grid_sample(
        base, places, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return F.avg_pool2d(rearrange(views, "b c (n h) w -> (b n) c h w", n=num_views), samples)


def valid_mask(homographies: Tensor, size: tuple[int, int]) -> Tensor:
    """Marks cells of views (h, w) with a centre inside the base: (N, 1, h, w), 1 or 0."""
    places, depth = _places(homographies, size)
    inside = (places.abs() <= 1).all(-1) & (depth > 0)
    return inside[:, None].to(homographies.dtype)


def _places(homographies: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Base coordinates (N, h, w, 2), x first, of a view's cells, and their depth (N, h, w).

    As sums of products, because a matrix product would be in bfloat16 under autocast.
    """
    y, x = (
        (2 * torch.arange(n, device=homographies.device, dtype=homographies.dtype) + 1) / n - 1
        for n in size
    )
    rows = homographies[:, :, :, None, None]
    mapped = rows[:, :, 0] * x + rows[:, :, 1] * y[:, None] + rows[:, :, 2]  # (N, 3, h, w)
    depth = mapped[:, 2]
    # Cells behind the horizon (depth <= 0) become far outside, not mirrored.
    places = mapped[:, :2] / depth[:, None].clamp(min=1e-6)
    return places.permute(0, 2, 3, 1), depth


def _between(source: Tensor, target: Tensor) -> Tensor:
    """The homographies (..., 3, 3) that map four points (..., 4, 2) to four others."""
    target = target.expand_as(source)
    x, y = source.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = []
    for axis, (a, b) in enumerate((((x, y, one), (zero,) * 3), ((zero,) * 3, (x, y, one)))):
        u = target[..., axis]
        rows.append(torch.stack([*a, *b, -x * u, -y * u], dim=-1))
    solution = torch.linalg.solve(
        torch.cat(rows, dim=-2), torch.cat([target[..., 0], target[..., 1]], dim=-1)
    )
    last = torch.ones_like(solution[..., :1])
    return torch.cat([solution, last], dim=-1).unflatten(-1, (3, 3))


def _translation(offset: Tensor) -> Tensor:
    matrix = torch.eye(3, dtype=offset.dtype).repeat(*offset.shape[:-1], 1, 1)
    matrix[..., :2, 2] = offset
    return matrix
