"""The kernels of local attention on a GPU, in Triton.

A program owns the cells of one square tile of one head, and walks over the rows of the tile's halo,
a few at a time: all that those cells see lies there. The products run on tensor cores, where the
cells of the halo that a query does not see cost less than gathering those that it does. As in flash
attention (arXiv 2205.14135) the softmax is kept up while walking, and the backward pass computes
the probabilities again from the log-sum-exp; keys own their tiles there, so nothing is added
atomically and every run gives the same bits.

Half-precision products take the probabilities in half precision too, and add up in float32;
float32 products are exact ones, not TF32.
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
    """Where the vectors of cells start in (B, height, width, heads, dim)."""
    return (((image.to(tl.int64) * height + y) * width + x) * heads + head) * dim


@triton.jit
def _penalty(dy, dx, slopes, head):
    """ALiBi to base 2: by rows in even heads, by columns in odd ones."""
    slope = tl.load(slopes + head) * 1.4426950408889634
    return slope * tl.where(head % 2 == 0, dy, dx).to(tl.float32)


@triton.jit
def _own(TILE: tl.constexpr, width):
    """Rows and columns of the program's tile, (TILE * TILE,) each."""
    tiles = tl.cdiv(width, TILE)
    i = tl.arange(0, TILE * TILE)
    y = tl.program_id(0) // tiles * TILE + i // TILE
    x = tl.program_id(0) % tiles * TILE + i % TILE
    return y, x


@triton.jit
def _halo(
    first, TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, width
):
    """Rows and columns of ROWS rows of the tile's halo, (ROWS * WIDE,) each."""
    tiles = tl.cdiv(width, TILE)
    j = tl.arange(0, ROWS * WIDE)
    y = tl.program_id(0) // tiles * TILE - RADIUS + first + j // WIDE
    x = tl.program_id(0) % tiles * TILE - RADIUS + j % WIDE
    return y, x


@triton.jit
def _forward(
    q, k, v, slopes, out, lse, height, width, heads, dim,
    TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1), tl.program_id(2)
    y, x = _own(TILE, width)
    d = tl.arange(0, DIM)
    inside = (y < height) & (x < width)
    own = _cells(image, y, x, height, width, head, heads, dim)[:, None] + d
    own_mask = inside[:, None] & (d < dim)
    queries = tl.load(q + own, own_mask, 0.0)
    largest = tl.full((TILE * TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE * TILE,), tl.float32)
    mixed = tl.zeros((TILE * TILE, DIM), tl.float32)
    for first in range(0, TILE + 2 * RADIUS, ROWS):
        ky, kx = _halo(first, TILE, RADIUS, ROWS, WIDE, width)
        there = (ky >= 0) & (ky < height) & (kx >= 0) & (kx < width)
        cells = _cells(image, ky, kx, height, width, head, heads, dim)[:, None] + d
        mask = there[:, None] & (d < dim)
        keys = tl.load(k + cells, mask, 0.0)
        dy, dx = tl.abs(y[:, None] - ky), tl.abs(x[:, None] - kx)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        logits -= _penalty(dy, dx, slopes, head)
        logits = tl.where(there & (dy <= RADIUS) & (dx <= RADIUS), logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        shrink = tl.exp2(largest - new)
        values = tl.load(v + cells, mask, 0.0)
        mixed *= shrink[:, None]
        mixed += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = new
    total = tl.where(inside, total, 1.0)
    tl.store(out + own, mixed / total[:, None], own_mask)
    tl.store(
        lse + _cells(image, y, x, height, width, head, heads, 1),
        largest + tl.log2(total),
        inside,
    )


@triton.jit
def _backward_of_queries(
    q, k, v, slopes, d_out, lse, shift, d_q, height, width, heads, dim,
    TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1), tl.program_id(2)
    y, x = _own(TILE, width)
    d = tl.arange(0, DIM)
    inside = (y < height) & (x < width)
    own = _cells(image, y, x, height, width, head, heads, dim)[:, None] + d
    own_mask = inside[:, None] & (d < dim)
    own_cells = _cells(image, y, x, height, width, head, heads, 1)
    queries, d_outs = tl.load(q + own, own_mask, 0.0), tl.load(d_out + own, own_mask, 0.0)
    lses, shifts = tl.load(lse + own_cells, inside, 0.0), tl.load(shift + own_cells, inside, 0.0)
    gradient = tl.zeros((TILE * TILE, DIM), tl.float32)
    for first in range(0, TILE + 2 * RADIUS, ROWS):
        ky, kx = _halo(first, TILE, RADIUS, ROWS, WIDE, width)
        there = (ky >= 0) & (ky < height) & (kx >= 0) & (kx < width)
        cells = _cells(image, ky, kx, height, width, head, heads, dim)[:, None] + d
        mask = there[:, None] & (d < dim)
        keys, values = tl.load(k + cells, mask, 0.0), tl.load(v + cells, mask, 0.0)
        dy, dx = tl.abs(y[:, None] - ky), tl.abs(x[:, None] - kx)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        logits -= _penalty(dy, dx, slopes, head) + lses[:, None]
        seen = inside[:, None] & there & (dy <= RADIUS) & (dx <= RADIUS)
        weights = tl.exp2(tl.where(seen, logits, -float("inf")))
        d_weights = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
        d_logits = weights * (d_weights - shifts[:, None])
        gradient += tl.dot(d_logits.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(d_q + own, gradient * (SCALE / 1.4426950408889634), own_mask)


@triton.jit
def _backward_of_keys(
    q, k, v, slopes, d_out, lse, shift, d_k, d_v, height, width, heads, dim,
    TILE: tl.constexpr, RADIUS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1), tl.program_id(2)
    y, x = _own(TILE, width)
    d = tl.arange(0, DIM)
    inside = (y < height) & (x < width)
    own = _cells(image, y, x, height, width, head, heads, dim)[:, None] + d
    own_mask = inside[:, None] & (d < dim)
    keys, values = tl.load(k + own, own_mask, 0.0), tl.load(v + own, own_mask, 0.0)
    of_keys = tl.zeros((TILE * TILE, DIM), tl.float32)
    of_values = tl.zeros((TILE * TILE, DIM), tl.float32)
    for first in range(0, TILE + 2 * RADIUS, ROWS):
        qy, qx = _halo(first, TILE, RADIUS, ROWS, WIDE, width)
        there = (qy >= 0) & (qy < height) & (qx >= 0) & (qx < width)
        cells = _cells(image, qy, qx, height, width, head, heads, dim)[:, None] + d
        mask = there[:, None] & (d < dim)
        queries, d_outs = tl.load(q + cells, mask, 0.0), tl.load(d_out + cells, mask, 0.0)
        query_cells = _cells(image, qy, qx, height, width, head, heads, 1)
        lses = tl.load(lse + query_cells, there, 0.0)
        shifts = tl.load(shift + query_cells, there, 0.0)
        dy, dx = tl.abs(y[:, None] - qy), tl.abs(x[:, None] - qx)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE
        logits -= _penalty(dy, dx, slopes, head) + lses
        seen = inside[:, None] & there & (dy <= RADIUS) & (dx <= RADIUS)
        weights = tl.exp2(tl.where(seen, logits, -float("inf")))
        of_values += tl.dot(weights.to(d_outs.dtype), d_outs, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
        d_logits = weights * (d_weights - shifts)
        of_keys += tl.dot(d_logits.to(queries.dtype), queries, input_precision=PRECISION)
    tl.store(d_k + own, of_keys * (SCALE / 1.4426950408889634), own_mask)
    tl.store(d_v + own, of_values, own_mask)


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
    """Side of a tile and cells of its halo at once: the largest that shared memory holds.

    It holds two vectors of each, and the products between them.
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
        f"heads of {q.shape[-1]} channels do not fit this GPU's shared memory; take more num_heads"
    )


@torch.compiler.assume_constant_result  # else compiled code would stop to ask
def _shared_memory(device: int) -> int:
    """Bytes that a program may have on a GPU."""
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Local attention; see `local_attention`.

    Args:
        q: (B, h, w, heads, d) float32, bfloat16 or float16, any strides.
        k: the same shape and dtype.
        v: the same shape and dtype.
        slopes: (heads,) float32.
        radius: cells that the window reaches from its centre.

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
        inputs: q, k and v, as `attend` got them.
        slopes: the same.
        outputs: what `attend` returned.
        d_out: the gradient of the output, (B, h, w, heads, d).
        radius: the same.
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
