"""Attention of every cell of a map to the square window around it, with two-dimensional ALiBi.

FeatSharp (arXiv 2502.16025) fuses its inputs with it. The windows slide and are cut off at the
border: a cell there sees fewer keys. PyTorch has no such operation that trains on a CPU, so this
is one, out of batched matrix products.

The map is cut in strips of columns. In a strip with its halo, the keys that a row of queries needs
are rows in succession, hence one matrix in memory; the matrices of consecutive rows overlap, which
batched products take as a stride. No key is copied more than (strip + 2r) / strip times, and with
the strip of 8 columns a query of a 7 x 7 window visits 98 keys. The backward pass is the same with
queries and keys exchanged: each strip owns keys, and computes the probabilities of all queries that
see them from the forward pass's log-sum-exp.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachers.upsamplers.precision import no_autocast

_STRIP = 8  # columns; measured on a CPU with AVX-512 for a 7 x 7 window: 6 and 12 are slower
_LOGITS_CPU = 1 << 18  # at once; they fit the second-level cache
_LOGITS = 1 << 26  # elsewhere: some hundred MB


def alibi_slopes(num_heads: int) -> Tensor:
    """1/2, 1/2, 1/4, 1/4, 1/8, ...: a row head and a column head of each (FeatSharp's code).

    Args:
        num_heads: heads.

    Returns:
        (num_heads,).
    """
    return 2.0 ** -((torch.arange(num_heads) + 2) // 2)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, slopes: Tensor | None = None
) -> Tensor:
    """softmax(q k / sqrt(d) - penalty) v over the window of each cell.

    Computes in float32 (float64 for float64) whatever the inputs are, also under autocast. The
    memory beyond the inputs and the output is that of some strips; nothing of the size of the
    logits is kept for the backward pass. Differentiable once.

    Args:
        q: (B, h, w, heads, d) any h and w, any strides.
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
    return _LocalAttention.apply(q, k, v, slopes, window // 2)


@dataclass(frozen=True)
class _Part:
    """What is computed at once: some heads of some images in one strip of columns.

    Its buffers hold planes, one an image and head, one below the other. A plane takes H = h + 2r
    rows, its own and a gap that no window of r rows up and down can cross; a buffer has 2r rows
    more. Where the data start at row r of a buffer, the window of the i-th row of the planes starts
    at row i of the buffer; where they start at row 2r, it ends there.
    """

    images: slice
    heads: slice
    columns: slice
    inside: slice  # the strip and its halo, as far as they lie inside the map
    before: int  # columns of the halo outside the map, left
    after: int  # and right
    height: int
    radius: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Columns of the strip."""
        return self.columns.stop - self.columns.start

    @property
    def halo_width(self) -> int:
        """Columns of the strip and its halo."""
        return self.width + 2 * self.radius

    @property
    def sides(self) -> tuple[int, int, int]:
        """Images, heads and rows H of the planes."""
        images, heads = (s.stop - s.start for s in (self.images, self.heads))
        return images, heads, self.height + 2 * self.radius

    def own(self, x: Tensor) -> Tensor:
        """A buffer of the strip of (B, h, w, heads, d), from row 2r on; zero elsewhere."""
        columns = x[self.images, :, self.columns, self.heads]
        return self._buffer(columns, 2 * self.radius, 0, 0, 0.0)

    def around(self, x: Tensor, outside: float = 0.0) -> Tensor:
        """A buffer of the strip and its halo, from row r on; `outside` elsewhere."""
        columns = x[self.images, :, self.inside, self.heads]
        return self._buffer(columns, self.radius, self.before, self.after, outside)

    def _buffer(self, x: Tensor, first: int, before: int, after: int, outside: float) -> Tensor:
        rows, width = math.prod(self.sides), before + x.shape[2] + after
        shape = (rows + 2 * self.radius, width, x.shape[4])
        buffer = torch.empty(shape, dtype=self.dtype, device=x.device)
        buffer[:first] = outside
        buffer[first + rows :] = outside
        planes = self.planes(buffer[first : first + rows])
        planes[:, :, self.height :] = outside
        planes[:, :, :, :before] = outside
        planes[:, :, :, width - after :] = outside
        planes[:, :, : self.height, before : width - after] = x.permute(0, 3, 1, 2, 4)
        return buffer

    def write(self, target: Tensor, planes: Tensor) -> None:
        """Writes the strip, (images, heads, H, width, d), into (B, h, w, heads, d)."""
        target = target[self.images, :, self.columns, self.heads]
        target.copy_(planes[:, :, : self.height].permute(0, 2, 3, 1, 4))

    def planes(self, rows: Tensor) -> Tensor:
        """(all rows of all planes, ...) as (images, heads, H, ...)."""
        return rows.unflatten(0, self.sides)

    def windows(self, buffer: Tensor) -> Tensor:
        """Each row of a buffer with the 2r below, (rows, (2r + 1) * width, d), overlapping."""
        _, width, dim = buffer.shape
        size = (math.prod(self.sides), (2 * self.radius + 1) * width, dim)
        return buffer.as_strided(size, (width * dim, dim, 1))

    def bias(self, slopes: Tensor) -> Tensor:
        """(heads, 1, width, (2r + 1) * halo width): ALiBi, and -inf where the window ends.

        From strip to halo; the same for keys in the halo as for queries.
        """
        slopes = slopes[self.heads].to(self.dtype)
        rows = torch.arange(-self.radius, self.radius + 1, device=slopes.device).abs()
        columns = torch.arange(-self.radius, self.width + self.radius, device=slopes.device)
        columns = (columns - columns[self.radius : self.radius + self.width, None]).abs()
        parity = torch.arange(self.heads.start, self.heads.stop, device=slopes.device) % 2
        along_rows = (slopes * (1 - parity))[:, None, None, None] * rows[:, None]
        along_columns = (slopes * parity)[:, None, None, None] * columns[:, None]
        bias = -(along_rows + along_columns)
        return bias.masked_fill_((columns > self.radius)[:, None], -torch.inf).flatten(2)[:, None]

    def mask_border(self, logits: Tensor) -> None:
        """Writes -inf where the keys of (images, heads, H, width, keys) lie outside the map."""
        logits = logits.unflatten(-1, (2 * self.radius + 1, self.halo_width))
        for i in range(min(self.radius, self.height)):
            logits[:, :, i, :, : self.radius - i] = -torch.inf
            logits[:, :, self.height - 1 - i, :, self.radius + 1 + i :] = -torch.inf
        logits[..., : self.before] = -torch.inf
        logits[..., self.halo_width - self.after :] = -torch.inf


def _parts(q: Tensor, radius: int) -> Iterator[_Part]:
    """Cuts (B, h, w, heads, d) so that a part has few enough logits, or one head."""
    batch, h, w, heads, _ = q.shape
    plane = (h + 2 * radius) * _STRIP * (2 * radius + 1) * (_STRIP + 2 * radius)
    most = _LOGITS_CPU if q.device.type == "cpu" else _LOGITS
    num_heads = min(max(most // plane, 1), heads)
    num_images = min(max(most // (plane * heads), 1), batch)
    for left, image, head in product(
        range(0, w, _STRIP), range(0, batch, num_images), range(0, heads, num_heads)
    ):
        right = min(left + _STRIP, w)
        inside = slice(max(left - radius, 0), min(right + radius, w))
        yield _Part(
            images=slice(image, min(image + num_images, batch)),
            heads=slice(head, min(head + num_heads, heads)),
            columns=slice(left, right),
            inside=inside,
            before=inside.start - (left - radius),
            after=right + radius - inside.stop,
            height=h,
            radius=radius,
            dtype=_compute_dtype(q),
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, radius: int) -> Tensor:
        ctx.radius = radius
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        # (B, h, w, heads, 1): the logarithm of each softmax's denominator
        lse = q.new_empty(*q.shape[:4], 1, dtype=_compute_dtype(q))
        with no_autocast(q):
            for part in _parts(q, radius):
                _attend(part, q, k, v, slopes, out, lse if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(q, k, v, slopes, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, out, lse = ctx.saved_tensors
        dtype = _compute_dtype(q)
        d_q = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        d_k, d_v = torch.empty_like(d_q, dtype=k.dtype), torch.empty_like(d_q, dtype=v.dtype)
        with no_autocast(q):
            shift = (out.to(dtype) * d_out).sum(-1, keepdim=True)
            for part in _parts(q, ctx.radius):
                _differentiate(part, (q, k, v), slopes, d_out, lse, shift, (d_q, d_k, d_v))
        return d_q.to(q.dtype), d_k, d_v, None, None


def _attend(
    part: _Part, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor | None
) -> None:
    """Writes the part's output, and its log-sum-exp where `lse` is given."""
    queries = part.own(q)[2 * part.radius :].mul_(q.shape[-1] ** -0.5)
    keys, values = part.windows(part.around(k)), part.windows(part.around(v))
    logits = part.planes(torch.bmm(queries, keys.mT)).add_(part.bias(slopes))
    part.mask_border(logits)
    weights = logits.softmax(-1)
    part.write(out, part.planes(torch.bmm(weights.flatten(0, 2), values)))
    if lse is not None:  # from the largest logit, whose weight does not underflow
        part.write(lse, logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log())


def _differentiate(
    part: _Part,
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    d_out: Tensor,
    lse: Tensor,
    shift: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of the strip's keys and values, adds what they give the queries.

    The strip owns keys; the windows are of the queries that see them. Queries outside the map have
    an infinite log-sum-exp, thus probability 0.

    Args:
        part: the strip.
        inputs: q, k and v.
        slopes: (heads,).
        d_out: the gradient of the output, its shape.
        lse: (B, h, w, heads, 1).
        shift: (B, h, w, heads, 1), sum of output times its gradient.
        gradients: d_q, d_k and d_v, written to.
    """
    (q, k, v), (d_q, d_k, d_v) = inputs, gradients
    r, scale = part.radius, q.shape[-1] ** -0.5
    keys, values = part.own(k), part.own(v)
    queries = part.windows(part.around(q).mul_(scale))
    d_outs = part.windows(part.around(d_out))

    weights = part.planes(torch.bmm(keys[2 * r :], queries.mT)).add_(part.bias(slopes))
    weights = weights.flatten(0, 2).sub_(part.windows(part.around(lse, torch.inf)).mT).exp_()
    all_d_logits = weights.new_empty(len(weights) + 2 * r, *weights.shape[1:])
    all_d_logits[: 2 * r] = 0  # zeros above, as `keys` has them
    d_logits = torch.bmm(values[2 * r :], d_outs.mT, out=all_d_logits[2 * r :])
    d_logits.sub_(part.windows(part.around(shift)).mT).mul_(weights)
    part.planes(d_logits)[:, :, part.height :] = 0
    part.write(d_k, part.planes(torch.bmm(d_logits, queries)))
    part.write(d_v, part.planes(torch.bmm(weights, d_outs)))

    # The same numbers by query row: what lies 2r - i rows above, in the i-th row of its window.
    row, m = d_logits.stride(0), part.halo_width
    size = (len(d_logits), 2 * r + 1, part.width, m)
    stride = (row, row - m, (2 * r + 1) * m, 1)
    by_query = all_d_logits.as_strided(size, stride, 2 * r * m).flatten(1, 2)
    halo = part.planes(torch.bmm(by_query.mT, part.windows(keys)))
    halo = halo[:, :, r : r + part.height, part.before : m - part.after]
    d_q = d_q[part.images, :, part.inside, part.heads]
    d_q.add_(halo.permute(0, 2, 3, 1, 4), alpha=scale)
