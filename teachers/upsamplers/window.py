"""Attention of output cells to windows of low-resolution cells, for SAPA and AnyUp.

All output cells within one low-resolution cell share its window, so the products with keys are one
matrix product for each low-resolution cell, and no key is copied to the output grid.
"""

import torch
from einops import rearrange
from torch import Tensor

from teachers.upsamplers.local_gather import local_gather
from teachers.upsamplers.precision import at_least_float32


def windows(cells: int, radius: int) -> tuple[Tensor, Tensor]:
    """Windows around the cells of one axis, truncated at its ends.

    A window that extends over an end is shifted inwards, so that all have the same length; its
    cells beyond the radius are masked.

    Args:
        cells: number of cells.
        radius: cells on either side.

    Returns:
        The first cell of each window, (cells,) int64, and whether its cells are within the radius,
        boolean (cells, min(2 * radius + 1, cells)).
    """
    length = min(2 * radius + 1, cells)
    cell = torch.arange(cells)
    first = (cell - radius).clamp(0, cells - length)
    distance = (first[:, None] + torch.arange(length) - cell[:, None]).abs()
    return first, distance <= radius


def window_upsample(
    features: Tensor, queries: Tensor, keys: Tensor, *, radius: int, heads: int, scale: float
) -> Tensor:
    """Mean of the features in a window, weighted by the softmax of query times key.

    The weights of several heads are averaged. The softmax is in float32 at least.

    Args:
        features: (B, C, h, w).
        queries: (B, heads * D, fh * h, fw * w).
        keys: (B, heads * D, h, w).
        radius: low-resolution cells on either side of the one that holds the output cell.
        heads: number of heads.
        scale: factor of the logits.

    Returns:
        (B, C, fh * h, fw * w), within the range of the features.
    """
    (h, w), (height, width) = features.shape[-2:], queries.shape[-2:]
    (rows, row_inside), (columns, column_inside) = windows(h, radius), windows(w, radius)
    n, m = row_inside.shape[1], column_inside.shape[1]
    inside = (row_inside[:, None, :, None] & column_inside[None, :, None, :]).flatten(2)
    around = keys
    for axis, first, length in ((2, rows, n), (-1, columns, m)):
        cells = (first[:, None] + torch.arange(length)).flatten().to(keys.device)
        around = around.index_select(axis, cells)
    k = rearrange(around, "b (e d) (h n) (w m) -> b h w e d (n m)", e=heads, n=n, m=m)
    q = rearrange(queries, "b (e d) (h fh) (w fw) -> b h w e (fh fw) d", e=heads, h=h, w=w)
    logits = at_least_float32((q * scale) @ k)
    outside = ~inside.to(logits.device)[:, :, None, None]
    weights = logits.masked_fill(outside, float("-inf")).softmax(-1).mean(3)
    fh, fw = height // h, width // w
    spread = rearrange(weights, "b h w (fh fw) (n m) -> b (h fh) (w fw) n m", fh=fh, n=n)
    return local_gather(
        features, spread.contiguous(), rows.repeat_interleave(fh), columns.repeat_interleave(fw)
    )
