"""Bilinear upsampling followed by a filter that differs at each position, as one sparse sum.

Both steps are linear in the map, so each kernel is folded onto the low-resolution cells that it
depends on (7 x 7 taps onto 5 x 5 cells at factor 2, onto 3 x 3 from factor 7 on) and applied to
those. This is exact, at the borders too, and needs no memory for the interpolated map.
"""

from functools import lru_cache

import torch
from torch import Tensor

from teachers.upsamplers.local_gather import local_gather
from teachers.upsamplers.neighbour_products import reflected


def upsample_and_filter(source: Tensor, kernels: Tensor) -> Tensor:
    """out[b, :, y, x] = sum_ij kernels[b, y, x, i, j] up[b, :, y + i - r, x + j - r].

    `up` is the source, interpolated bilinearly (half-pixel centres) to the grid of the kernels and
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
    """Weights of the source cells in the taps of a filter over an interpolated axis.

    Args:
        source: cells before interpolation.
        target: cells after interpolation; reflected at both ends.
        radius: the filter has 2 radius + 1 taps.

    Returns:
        The first source cell that the filter at each position depends on, (target,) int64, and the
        weights of the cells from there in each tap, (target, 2 radius + 1, cells) float64. Both are
        on the CPU, in pinned memory if there is a GPU.
    """
    # On the CPU whatever the default device is, because the result is cached.
    cells_after = torch.arange(target, device="cpu")
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
    """Converts kernels on interpolated cells to (B, H, W, kh, kw) on those before interpolation.

    Each axis is one matrix product for each row or column, with the Kronecker product of the
    weights and the identity: more multiplications than a small product for each position, but a
    fourth of the time.

    Args:
        kernels: (B, H, W, taps, taps).
        from_rows: (H, taps, kh).
        from_columns: (W, taps, kw).
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
