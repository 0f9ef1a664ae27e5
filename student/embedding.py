"""Patch embedding with cropped position embeddings (CPE).

CPE serves any resolution and aspect ratio with one table of positions: in training each image sees
a random window of the table; in evaluation the table is resized and its top-left corner is used.
Source: RO-ViT (arXiv 2305.07011), in the form of AM-RADIO (arXiv 2312.06709) and RADIOv2.5 (arXiv
2412.07679). As in the RADIO family, whose weights expect it, interpolation aligns corners in
training, but uses half-pixel centres in evaluation.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Smallest share of the table's area that a window covers, before aspect jitter.
MIN_AREA = 0.1
MAX_ASPECT = 4 / 3


def sample_viewports(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draws a random window of the unit square for each image, with torch's default generator.

    Returns:
        The top-left corners (y, x) and the (height, width) of the windows, (B, 2) each, in
        [0, 1], float32. The windows lie inside the square.
    """
    u = torch.rand(batch, 4, device=device)
    smallest = math.sqrt(MIN_AREA)
    side = smallest + (1 - smallest) * u[:, 0]
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(MAX_ASPECT))
    extent = torch.stack([side / aspect, side * aspect], dim=-1).clamp(max=1)
    return u[:, 2:] * (1 - extent), extent


def crop_positions(table: Tensor, origin: Tensor, extent: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolates a window of the table for each image, bilinearly, with aligned corners.

    Equal to `grid_sample(..., align_corners=True)`, but computed as a weighted sum of four table
    rows for each token: its backward pass needs no table for each image and is deterministic on
    GPUs.

    Args:
        table: (S, S, D) float32.
        origin: (B, 2) top-left corners (y, x) in [0, 1].
        extent: (B, 2) sizes (height, width) in [0, 1].
        grid: (h, w) cells to interpolate.

    Returns:
        (B, h * w, D) float32.
    """
    side = table.shape[0]
    low, high, weight = [], [], []
    for axis, cells in enumerate(grid):
        steps = torch.linspace(0, 1, cells, device=table.device)
        at = (origin[:, axis, None] + extent[:, axis, None] * steps) * (side - 1)
        floor = at.floor().clamp(0, side - 1)
        low.append(floor.long())
        high.append((low[-1] + 1).clamp(max=side - 1))
        weight.append(at - floor)
    (y0, x0), (y1, x1) = ((rows[:, :, None], cols[:, None, :]) for rows, cols in (low, high))
    fy, fx = weight[0][:, :, None], weight[1][:, None, :]
    corners = [(y0, x0), (y0, x1), (y1, x0), (y1, x1)]
    shares = [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx]
    positions = F.embedding_bag(
        torch.stack([y * side + x for y, x in corners], dim=-1).flatten(0, 2),
        table.flatten(0, 1),
        per_sample_weights=torch.stack(shares, dim=-1).flatten(0, 2),
        mode="sum",
    )
    return rearrange(positions, "(b n) d -> b n d", b=len(origin))


def fit_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes the table to the smallest square that holds a grid, and crops its top-left corner.

    A non-square image thus sees a corner of a square map and not a stretched map.

    Args:
        table: (S, S, D) float32.
        grid: (h, w) cells, of any size.

    Returns:
        (h * w, D) float32; the exact values of the table where the grid has its size.
    """
    height, width = grid
    square = max(grid)
    # No special case for equal sides, and contiguous: torch.export would specialise its program to
    # one branch of a condition on sizes or strides. Resizing to the same size keeps all bits.
    channels_first = rearrange(table, "y x d -> 1 d y x")
    resized = F.interpolate(channels_first, (square, square), mode="bilinear")
    corner = rearrange(resized, "1 d y x -> y x d")[:height, :width]
    return rearrange(corner.contiguous(), "y x d -> (y x) d")


class Embedding(nn.Module):
    """Linear patch embedding plus positions, after class tokens and registers.

    Class tokens and registers get no position.

    Args:
        width: channels of a token.
        patch_size: pixels per token, along both axes.
        table_side: cells of the position table, along each axis.
        num_class_tokens: one for each teacher.
        num_registers: register tokens.
        position_dropout: probability that an image gets no position embeddings in training.
    """

    def __init__(
        self,
        width: int,
        *,
        patch_size: int,
        table_side: int,
        num_class_tokens: int,
        num_registers: int,
        position_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.position_dropout = position_dropout
        self.patch_size = patch_size
        scale = width**-0.5
        self.projection = nn.Linear(3 * patch_size**2, width, bias=False)
        self.positions = nn.Parameter(torch.randn(table_side, table_side, width) * scale)
        self.class_tokens = nn.Parameter(torch.randn(num_class_tokens, width) * scale)
        # None rather than empty: optimisers should get no parameter without elements.
        self.registers = (
            nn.Parameter(torch.randn(num_registers, width) * scale) if num_registers else None
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images.

        Args:
            images: (B, 3, H, W), normalised; sides are multiples of the patch size.

        Returns:
            (B, class tokens + registers + h * w, D), in the parameters' dtype.
        """
        p = self.patch_size
        # Not len(images): torch.export would take it for a constant.
        batch, grid = images.shape[0], (images.shape[2] // p, images.shape[3] // p)
        patches = rearrange(images, "b c (h y) (w x) -> b (h w) (c y x)", y=p, x=p)
        tokens = self.projection(patches.to(self.positions.dtype))
        tokens = tokens + self._positions(batch, grid).to(tokens.dtype)
        prefix = [self.class_tokens.expand(batch, -1, -1)]
        if self.registers is not None:
            prefix.append(self.registers.expand(batch, -1, -1))
        return torch.cat([*(part.to(tokens.dtype) for part in prefix), tokens], dim=1)

    def _positions(self, batch: int, grid: tuple[int, int]) -> Tensor:
        table = self.positions.float()
        if not self.training:
            return fit_positions(table, grid)
        positions = crop_positions(table, *sample_viewports(batch, table.device), grid)
        if self.position_dropout:
            drawn = torch.rand(batch, 1, 1, device=table.device)
            positions = positions * (drawn >= self.position_dropout)
        return positions
