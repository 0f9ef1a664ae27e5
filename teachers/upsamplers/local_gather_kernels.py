"""Triton kernel of `local_gather` on a GPU, for the sum but not for its gradients.

A program computes some columns of one output row and some channels. Neighbouring columns read the
same cells from the cache; PyTorch's embedding bag loads them again for every column.
"""

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _CHANNELS = 16, 128  # of a program


@triton.jit
def _sum(
    table, weights, rows, columns, out, height, width, source_height, source_width, dim,
    KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, y = tl.program_id(0).to(tl.int64) // height, tl.program_id(0) % height
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = x < width
    mask = inside[:, None] & (d < dim)
    first = (image * source_height + tl.load(rows + y)) * source_width
    first += tl.load(columns + x, inside, 0)
    position = (image * height + y) * width + x
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            weight = tl.load(weights + position * (KH * KW) + (i * KW + j), inside, 0.0)
            cells = first + (i * source_width + j)
            values = tl.load(table + cells[:, None] * dim + d, mask, 0.0)
            total += weight.to(tl.float32)[:, None] * values.to(tl.float32)
    tl.store(out + position[:, None] * dim + d, total, mask)


def gather(
    table: Tensor, weights: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]
) -> Tensor:
    """Computes `local_gather`; adds up in float32.

    Args:
        table: (B h w, D) contiguous, in float32, bfloat16 or float16.
        weights: (B, H, W, kh, kw).
        rows: (H,) int64.
        columns: (W,) int64.
        size: (h, w).

    Returns:
        (B H W, D) in the dtype of `table`.
    """
    batch, height, width, kh, kw = weights.shape
    dim = table.shape[1]
    out = table.new_empty(batch * height * width, dim)
    grid = (batch * height, triton.cdiv(width, _COLUMNS), triton.cdiv(dim, _CHANNELS))
    _sum[grid](
        table, weights.contiguous(), rows, columns, out, height, width, *size, dim,
        KH=kh, KW=kw, COLUMNS=_COLUMNS, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return out
