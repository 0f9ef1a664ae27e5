"""Attention of every cell of a map to the square window around it, with two-dimensional ALiBi.

FeatSharp (arXiv 2502.16025) fuses its inputs with it. The windows slide and are cut off at the
border: a cell there attends to fewer keys. PyTorch has no such operation that trains on a CPU, so
this one is made of batched matrix products.

The map is cut into strips of columns, see `local_attention_strips`. No key is copied more than
(strip + 2r) / strip times; with strips of 8 columns, a query of a 7 x 7 window is multiplied with
98 keys. The backward pass is the same with queries and keys exchanged: a strip holds keys, and
recomputes the probabilities of all queries that attend to them from the log-sum-exp of the forward
pass. Logits are to base 2: on a CPU, PyTorch computes exp2 three times as fast as exp.

On a GPU, `local_attention_kernels` computes the same function.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachers.upsamplers.local_attention_strips import LOG2_E, Strip, strips
from teachers.upsamplers.precision import compute_dtype, has_kernels, no_autocast

_ROWS = 8  # of the map at once, to bound memory


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes (num_heads,) 1/2, 1/2, 1/4, 1/4, ...: a row and a column head of each.

    Source: the public code of FeatSharp (arXiv 2502.16025).
    """
    return 2.0 ** -((torch.arange(num_heads) + 2) // 2)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, slopes: Tensor | None = None
) -> Tensor:
    """softmax(q k / sqrt(d) - penalty) v over the window of each cell.

    Computes in float32 (float64 for float64) whatever the inputs are, also under autocast; on a
    GPU, inputs and probabilities are multiplied in the inputs' precision. Beyond inputs and output
    it needs memory for some strips only; nothing of the size of the logits is kept for the backward
    pass. Differentiable once.

    Args:
        q: (B, h, w, heads, d), any h and w, any strides.
        k: the same shape.
        v: the same shape.
        window: cells along each side of the window, odd.
        slopes: (heads,) penalty for each row of distance in even heads, for each column of distance
            in odd heads; None for none. Not differentiated.

    Returns:
        (B, h, w, heads, d), of the dtype of `q`.

    Raises:
        ValueError: the shapes differ, or the window is even or not positive.
    """
    if q.ndim != 5 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v of shapes {shapes}: expected (B, h, w, heads, d), all equal")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window}: expected an odd number of cells, 1 or more")
    if slopes is None:
        slopes = q.new_zeros(q.shape[3])
    if slopes.shape != q.shape[3:4]:
        raise ValueError(f"slopes of shape {tuple(slopes.shape)}: expected ({q.shape[3]},)")
    return _LocalAttention.apply(q, k, v, slopes.to(compute_dtype(q)), window // 2)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, radius: int) -> Tensor:
        ctx.radius = radius
        if has_kernels(q):
            from teachers.upsamplers import local_attention_kernels

            out, lse = local_attention_kernels.attend(q, k, v, slopes, radius)
            ctx.save_for_backward(q, k, v, slopes, out, lse)
            return out
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        # (B, h, w, heads, 1): the logarithm of each softmax's denominator
        lse = q.new_empty(*q.shape[:4], 1, dtype=compute_dtype(q))
        with no_autocast(q):
            for strip in strips(q, radius):
                _attend(strip, q, k, v, slopes, out, lse if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(q, k, v, slopes, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, out, lse = ctx.saved_tensors
        if has_kernels(q):
            from teachers.upsamplers import local_attention_kernels

            gradients = local_attention_kernels.differentiate(
                (q, k, v), slopes, (out, lse), d_out, ctx.radius
            )
            return *gradients, None, None
        dtype = compute_dtype(q)
        d_q = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        d_k, d_v = torch.empty_like(d_q, dtype=k.dtype), torch.empty_like(d_q, dtype=v.dtype)
        with no_autocast(q):
            shift = torch.empty_like(lse)
            for rows in zip(*(x.split(_ROWS, 1) for x in (out, d_out, shift)), strict=True):
                torch.sum(rows[0] * rows[1], -1, keepdim=True, dtype=dtype, out=rows[2])
            for strip in strips(q, ctx.radius):
                _differentiate(strip, (q, k, v), slopes, d_out, lse, shift, (d_q, d_k, d_v))
        return d_q.to(q.dtype), d_k, d_v, None, None


def _attend(
    strip: Strip, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor | None
) -> None:
    """Writes the output of a strip's queries, and their log-sum-exp where `lse` is given."""
    space, scale = strip.space, q.shape[-1] ** -0.5 * LOG2_E
    queries = strip.own("queries", q)[2 * strip.radius :].mul_(scale)
    keys, values = strip.windows(strip.around("keys", k)), strip.windows(strip.around("values", v))
    logits = space.product("logits", queries, keys.mT)
    strip.planes(logits).add_(strip.bias(slopes))
    strip.mask_border(strip.planes(logits))
    largest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(largest).exp2_()
    total = weights.sum(-1, keepdim=True)
    strip.write(out, space.product("mixed", weights, values).div_(total))
    if lse is not None:
        strip.write(lse, largest + total.log2())


def _differentiate(
    strip: Strip,
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    d_out: Tensor,
    lse: Tensor,
    shift: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of a strip's keys and values, and adds its share to those of queries.

    The strip holds keys; the windows are of the queries that attend to them. Queries outside the
    map have an infinite log-sum-exp, thus probability 0.

    Args:
        strip: the strip.
        inputs: q, k and v.
        slopes: (heads,).
        d_out: the gradient of the output, its shape.
        lse: (B, h, w, heads, 1).
        shift: (B, h, w, heads, 1), sum of output times its gradient.
        gradients: d_q, d_k and d_v, written to.
    """
    (q, k, v), (d_q, d_k, d_v) = inputs, gradients
    scale = q.shape[-1] ** -0.5
    space, r = strip.space, strip.radius
    keys, values = strip.own("keys", k), strip.own("values", v)
    queries = strip.windows(strip.around("queries", q).mul_(scale * LOG2_E))
    d_outs = strip.windows(strip.around("d_outs", d_out))
    lses = strip.windows(strip.around("lses", lse, torch.inf)).mT
    shifts = strip.windows(strip.around("shifts", shift)).mT

    weights = space.product("weights", keys[2 * r :], queries.mT)
    strip.planes(weights).add_(strip.bias(slopes))
    weights.sub_(lses).exp2_()
    strip.write(d_v, space.product("own", weights, d_outs))

    rows, width, visits = weights.shape
    all_d_logits = space.take("d_logits", rows + 2 * r, width, visits)
    all_d_logits[: 2 * r] = 0  # as in `keys`, the first 2r rows are empty
    d_logits = torch.bmm(values[2 * r :], d_outs.mT, out=all_d_logits[2 * r :])
    d_logits.sub_(shifts).mul_(weights)
    strip.planes(d_logits)[:, :, strip.height :] = 0
    strip.write(d_k, space.product("own", d_logits, queries).div_(LOG2_E))
    _add_to_queries(strip, all_d_logits, keys, d_q, scale)


def _add_to_queries(
    strip: Strip, d_logits: Tensor, keys: Tensor, d_q: Tensor, scale: float
) -> None:
    """Adds to the gradients of the queries what a strip's keys contribute.

    Args:
        strip: the strip.
        d_logits: the gradients of the logits by row of keys, after 2r empty rows,
            (rows + 2r, width, (2r + 1) * halo width).
        keys: the strip's, after 2r empty rows.
        d_q: the gradient of all queries, added to.
        scale: factor of the logits.
    """
    r, m, (_, width, visits) = strip.radius, strip.halo_width, d_logits.shape
    # The same numbers by row of queries: those 2r - i rows above, in row i of its window.
    row = d_logits.stride(0)
    size, stride = (len(d_logits) - 2 * r, 2 * r + 1, width, m), (row, row - m, visits, 1)
    by_query = strip.space.take("weights", *size)
    by_query.copy_(d_logits.as_strided(size, stride, 2 * r * m))
    halo = strip.space.product("halo", by_query.flatten(1, 2).mT, strip.windows(keys))
    halo = strip.planes(halo)[:, :, r : r + strip.height, strip.before : m - strip.after]
    d_q[strip.images, :, strip.inside, strip.heads].add_(halo.permute(0, 2, 3, 1, 4), alpha=scale)
