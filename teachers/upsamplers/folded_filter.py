"""Bilinear upsampling, then a filter of its own at each position, in one low-resolution sum.

Both steps are linear in the map, so each kernel is folded onto the cells that it reaches before
interpolation (7 x 7 taps onto 5 x 5 cells at factor 2, 3 x 3 from factor 7 on) and applied to
those: exact at the borders too, and neither the interpolated map nor its neighbourhoods exist.
"""

from functools import lru_cache

import torch
from torch import Tensor

from teachers.upsamplers.local_gather import local_gather
from teachers.upsamplers.neighbour_products import reflected


def upsample_and_filter(source: Tensor, kernels: Tensor) -> Tensor:
    """out[b, :, y, x] = sum_ij kernels[b, y, x, i, j] up[b, :, y + i - r, x + j - r].

    `up` is the source, interpolated bilinearly (half-pixel centres) to the grid of the kernels, and
    reflected about its outermost cells beyond the border.

    Args:
        source: (B, D, h, w), of any floating-point dtype.
        kernels: (B, H, W, 2r + 1, 2r + 1); H and W need not be multiples of h and w.

    Returns:
        (B, D, H, W) in the dtype of `source` and in the memory format channels_last.
    """
    (h, w), (height, width, taps) = source.shape[-2:], kernels.shape[1:4]
    rows, from_rows = _axis(h, height, taps // 2)
    columns, from_columns = _axis(w, width, taps // 2)
    from_rows, from_columns = (
        shares.to(kernels.device, non_blocking=True).to(kernels.dtype)
        for shares in (from_rows, from_columns)
    )
    folded = _fold(kernels, from_rows, from_columns)
    return local_gather(source, folded, rows, columns)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _axis(source: int, target: int, radius: int) -> tuple[Tensor, Tensor]:
    """What the taps of a filter over an interpolated axis read of the cells before interpolation.

    Args:
        source: cells before.
        target: cells after; filtered with reflection at both ends.
        radius: the filter has 2 radius + 1 taps.

    Returns:
        The first cell that each position's filter reaches (target,) int64, and the share of each
        cell from there in each tap (target, 2 radius + 1, cells) float64; both on the CPU, where
        there is a GPU in memory that it reads without anyone waiting.
    """
    cells_after = torch.arange(target, device="cpu")  # whatever the default: the result is kept
    centres = (cells_after.double() + 0.5) * source / target - 0.5
    centres = centres.clamp(0, source - 1)
    below = centres.floor().long()
    above = centres.ceil().long()
    taps = cells_after[:, None] + torch.arange(-radius, radius + 1, device="cpu")
    taps = reflected(taps, target)
    low, high, share = below[taps], above[taps], (centres - below)[taps]
    first = low.amin(1)
    cells = int((high.amax(1) - first).max()) + 1
    first = first.clamp(max=source - cells)
    shares = torch.zeros(*taps.shape, cells, dtype=torch.float64, device="cpu")
    shares.scatter_add_(2, (low - first[:, None])[..., None], (1 - share)[..., None])
    shares.scatter_add_(2, (high - first[:, None])[..., None], share[..., None])
    if torch.cuda.is_available():
        return first.pin_memory(), shares.pin_memory()
    return first, shares


def _fold(kernels: Tensor, from_rows: Tensor, from_columns: Tensor) -> Tensor:
    """Kernels on interpolated cells, as kernels on the cells before interpolation.

    Both axes are one product of matrices for each row and for each column, which the Kronecker
    products with the identity make of them: more multiplications than needed, and a fourth of the
    time that one small product for each position takes.

    Args:
        kernels: (B, H, W, taps, taps).
        from_rows: (H, taps, kh).
        from_columns: (W, taps, kw).

    Returns:
        (B, H, W, kh, kw).
    """
    batch, height, width, taps, _ = kernels.shape
    kh, kw = from_rows.shape[2], from_columns.shape[2]
    identity = torch.eye(max(taps, kh), dtype=kernels.dtype, device=kernels.device)
    by_row = torch.einsum("htk,uv->htukv", from_rows, identity[:taps, :taps])
    by_column = torch.einsum("wtk,uv->wutvk", from_columns, identity[:kh, :kh])
    rows = kernels.flatten(3) @ by_row.reshape(height, taps * taps, kh * taps)
    columns = rows.view(batch * height, width, kh * taps).transpose(0, 1)
    folded = columns.bmm(by_column.reshape(width, kh * taps, kh * kw)).transpose(0, 1)
    return folded.reshape(batch, height, width, kh, kw)
