"""Triton kernels of local attention on a GPU.

A program computes the cells of one square tile of one head. It walks over the rows of the tile's
halo, a few at a time: all keys of those cells lie there. The products run on tensor cores, where
cells of the halo that a query does not attend to cost less than gathering those that it does. As in
FlashAttention (Dao et al., arXiv 2205.14135), the softmax is updated along the way, and the
backward pass recomputes the probabilities from the log-sum-exp. There, keys own the tiles: nothing
is added atomically, and every run gives the same bits.

Half-precision products take the probabilities in half precision too, and add up in float32;
float32 products are exact, not TF32.
"""

import math
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_TILES = (8, 4)  # cells along each side
_KEYS = (32, 16)  # cells of the halo at once, or one row of it
_LOG2_E = math.log2(math.e)


@triton.jit
def _cells(image, y, x, height, width, head, heads, dim):
    """Offsets of cells' vectors in (B, height, width, heads, dim)."""
    return (((image.to(tl.int64) * height + y) * width + x) * heads + head) * dim


@triton.jit
def _rectangle(
    top, left, height, width, heads, dim,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS cells, n in all, that start at (top, left) of the program's tile.

    Returns:
        Rows, columns and whether they lie inside the map, (n,) each; offsets of their vectors in
        (B, height, width, heads, dim) and a mask for loading these, (n, DIM) each.
    """
    tiles = tl.cdiv(width, TILE)
    i = tl.arange(0, ROWS * COLUMNS)
    y = tl.program_id(0) // tiles * TILE + top + i // COLUMNS
    x = tl.program_id(0) % tiles * TILE + left + i % COLUMNS
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    d = tl.arange(0, DIM)
    cells = _cells(tl.program_id(2), y, x, height, width, tl.program_id(1), heads, dim)
    return y, x, inside, cells[:, None] + d, inside[:, None] & (d < dim)


@triton.jit
def _scalars(y, x, height, width, heads):
    """Offsets (n,) of this program's entries at cells y, x in (B, height, width, heads, 1)."""
    return _cells(tl.program_id(2), y, x, height, width, tl.program_id(1), heads, 1)


@triton.jit
def _relation(y, x, hy, hx, slopes, RADIUS: tl.constexpr):
    """ALiBi to base 2 between own cells (n,) and the halo's (m,), and which are in reach, (n, m).

    ALiBi counts rows in even heads, columns in odd ones.
    """
    head = tl.program_id(1)
    dy, dx = tl.abs(y[:, None] - hy), tl.abs(x[:, None] - hx)
    slope = tl.load(slopes + head) * 1.4426950408889634
    penalty = slope * tl.where(head % 2 == 0, dy, dx).to(tl.float32)
    return penalty, (dy <= RADIUS) & (dx <= RADIUS)


@triton.jit
def _forward(
    q, k, v, slopes, out, lse, height, width, heads, dim,
    TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    y, x, inside, own, mask = _rectangle(0, 0, height, width, heads, dim, TILE, TILE, TILE, DIM)
    queries = tl.load(q + own, mask, 0.0)
    largest = tl.full((TILE * TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE * TILE,), tl.float32)
    mixed = tl.zeros((TILE * TILE, DIM), tl.float32)
    for first in range(0, TILE + 2 * RADIUS, ROWS):
        ky, kx, there, cells, halo_mask = _rectangle(
            first - RADIUS, -RADIUS, height, width, heads, dim, TILE, ROWS, WIDE, DIM
        )
        keys = tl.load(k + cells, halo_mask, 0.0)
        penalty, near = _relation(y, x, ky, kx, slopes, RADIUS)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        logits -= penalty
        logits = tl.where(there & near, logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        shrink = tl.exp2(largest - new)
        values = tl.load(v + cells, halo_mask, 0.0)
        mixed *= shrink[:, None]
        mixed += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = new
    total = tl.where(inside, total, 1.0)
    tl.store(out + own, mixed / total[:, None], mask)
    tl.store(lse + _scalars(y, x, height, width, heads), largest + tl.log2(total), inside)


@triton.jit
def _backward_of_queries(
    q, k, v, slopes, d_out, lse, shift, d_q, height, width, heads, dim,
    TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    y, x, inside, own, mask = _rectangle(0, 0, height, width, heads, dim, TILE, TILE, TILE, DIM)
    scalars = _scalars(y, x, height, width, heads)
    queries, d_outs = tl.load(q + own, mask, 0.0), tl.load(d_out + own, mask, 0.0)
    lses, shifts = tl.load(lse + scalars, inside, 0.0), tl.load(shift + scalars, inside, 0.0)
    gradient = tl.zeros((TILE * TILE, DIM), tl.float32)
    for first in range(0, TILE + 2 * RADIUS, ROWS):
        ky, kx, there, cells, halo_mask = _rectangle(
            first - RADIUS, -RADIUS, height, width, heads, dim, TILE, ROWS, WIDE, DIM
        )
        keys, values = tl.load(k + cells, halo_mask, 0.0), tl.load(v + cells, halo_mask, 0.0)
        penalty, near = _relation(y, x, ky, kx, slopes, RADIUS)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        logits -= penalty + lses[:, None]
        weights = tl.exp2(tl.where(inside[:, None] & there & near, logits, -float("inf")))
        d_weights = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
        d_logits = weights * (d_weights - shifts[:, None])
        gradient += tl.dot(d_logits.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(d_q + own, gradient * (SCALE / 1.4426950408889634), mask)


@triton.jit
def _backward_of_keys(
    q, k, v, slopes, d_out, lse, shift, d_k, d_v, height, width, heads, dim,
    TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    y, x, inside, own, mask = _rectangle(0, 0, height, width, heads, dim, TILE, TILE, TILE, DIM)
    keys, values = tl.load(k + own, mask, 0.0), tl.load(v + own, mask, 0.0)
    of_keys = tl.zeros((TILE * TILE, DIM), tl.float32)
    of_values = tl.zeros((TILE * TILE, DIM), tl.float32)
    for first in range(0, TILE + 2 * RADIUS, ROWS):
        qy, qx, there, cells, halo_mask = _rectangle(
            first - RADIUS, -RADIUS, height, width, heads, dim, TILE, ROWS, WIDE, DIM
        )
        scalars = _scalars(qy, qx, height, width, heads)
        queries, d_outs = tl.load(q + cells, halo_mask, 0.0), tl.load(d_out + cells, halo_mask, 0.0)
        lses, shifts = tl.load(lse + scalars, there, 0.0), tl.load(shift + scalars, there, 0.0)
        penalty, near = _relation(y, x, qy, qx, slopes, RADIUS)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE
        logits -= penalty + lses
        weights = tl.exp2(tl.where(inside[:, None] & there & near, logits, -float("inf")))
        of_values += tl.dot(weights.to(d_outs.dtype), d_outs, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
        d_logits = weights * (d_weights - shifts)
        of_keys += tl.dot(d_logits.to(queries.dtype), queries, input_precision=PRECISION)
    tl.store(d_k + own, of_keys * (SCALE / 1.4426950408889634), mask)
    tl.store(d_v + own, of_values, mask)


def _launch(kernel: Any, tensors: list[Tensor], radius: int) -> None:
    """Runs a kernel for every tile, head and image of its first tensor, (B, h, w, heads, d)."""
    q = tensors[0]
    batch, h, w, heads, dim = q.shape
    padded = max(triton.next_power_of_2(dim), 16)
    tile, keys = _sizes(q, padded, radius)
    wide = triton.next_power_of_2(tile + 2 * radius)
    kernel[(triton.cdiv(h, tile) * triton.cdiv(w, tile), heads, batch)](
        *tensors, h, w, heads, dim,
        TILE=tile, RADIUS=radius, ROWS=max(keys // wide, 1), WIDE=wide,
        DIM=padded, SCALE=dim**-0.5 * _LOG2_E,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=8 if padded > 64 else 4, num_stages=2,
    )  # fmt: skip


def _sizes(q: Tensor, padded: int, radius: int) -> tuple[int, int]:
    """Side of a tile and cells of its halo at once: the largest that fit in shared memory.

    Shared memory holds two vectors of each, and the products between them.
    """
    if not q.is_cuda:
        return _TILES[0], _KEYS[0]
    most = _shared_memory(q.device.index)
    for tile, keys in product(_TILES, _KEYS):
        cells = max(keys, triton.next_power_of_2(tile + 2 * radius))
        vectors = 2 * (tile**2 + cells) * padded * q.element_size()
        if vectors + tile**2 * cells * 4 <= most:
            return tile, keys
    raise ValueError(
        f"heads of {q.shape[-1]} channels do not fit in this GPU's shared memory; use more "
        "num_heads"
    )


@torch.compiler.assume_constant_result  # else compiled code would break its graph here
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that a program may use on a GPU."""
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Computes `local_attention` on a GPU.

    Args:
        q: (B, h, w, heads, d) float32, bfloat16 or float16, any strides.
        k: the same shape and dtype.
        v: the same shape and dtype.
        slopes: (heads,) float32.
        radius: cells that the window extends from its centre.

    Returns:
        The output (B, h, w, heads, d), and the log-sum-exp to base 2 (B, h, w, heads, 1), float32.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(*q.shape[:4], 1, dtype=torch.float32)
    _launch(_forward, [q, k, v, slopes, out, lse], radius)
    return out, lse


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    outputs: tuple[Tensor, Tensor],
    d_out: Tensor,
    radius: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v.

    Args:
        inputs: q, k and v of `attend`.
        slopes: as for `attend`.
        outputs: the results of `attend`.
        d_out: the gradient of the output, (B, h, w, heads, d).
        radius: as for `attend`.
    """
    q, k, v = (x.contiguous() for x in inputs)
    out, lse = outputs
    d_out = d_out.to(q.dtype).contiguous()
    shift = (out.float() * d_out.float()).sum(-1, keepdim=True)
    shared = [q, k, v, slopes, d_out, lse, shift]
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    _launch(_backward_of_queries, [*shared, d_q], radius)
    _launch(_backward_of_keys, [*shared, d_k, d_v], radius)
    return d_q, d_k, d_v
