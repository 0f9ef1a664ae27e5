"""Attention of every cell of a map to the square window around it, with two-dimensional ALiBi.

FeatSharp (arXiv 2502.16025) fuses its inputs with it. The windows slide and are cut off at the
border: a cell there sees fewer keys. PyTorch has no such operation that trains on a CPU, so this
is one, out of batched matrix products.

The map is cut in strips of columns. In a strip with its halo, the keys that a row of queries needs
are rows in succession, hence one matrix in memory; the matrices of consecutive rows overlap, which
batched products take as a stride. No key is copied more than (strip + 2r) / strip times, and with
the strip of 8 columns a query of a 7 x 7 window visits 98 keys. The backward pass is the same with
queries and keys exchanged: each strip owns keys, and computes the probabilities of all queries that
see them from the forward pass's log-sum-exp. Logits are to base 2, whose power PyTorch computes
three times as fast on a CPU as that of e.

On a GPU the same function is `local_attention_kernels`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachers.upsamplers.precision import has_kernels, no_autocast

_STRIP = 8  # columns; measured on a CPU with AVX-512 for a 7 x 7 window: 6 and 12 are slower
_LOGITS_CPU = 1 << 20  # at once; they stay in a cache
_LOGITS = 1 << 26  # elsewhere: some hundred MB
_LOG2_E = math.log2(math.e)


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

    Computes in float32 (float64 for float64) whatever the inputs are, also under autocast; on a
    GPU half-precision inputs are multiplied as they are, and so are their probabilities. The
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
    return _LocalAttention.apply(q, k, v, slopes.to(_compute_dtype(q)), window // 2)


class _Workspace:
    """Memory by name, used again by every part: fresh memory costs a CPU a third of the time."""

    def __init__(self, x: Tensor) -> None:
        self._like, self._flat = x, dict[str, Tensor]()

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; what was taken under this name before is lost."""
        count = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < count:
            self._flat[name] = self._like.new_empty(count, dtype=_compute_dtype(self._like))
        return self._flat[name][:count].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The batched matrix product."""
        return torch.bmm(a, b, out=self.take(name, *a.shape[:2], b.shape[2]))


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
    space: _Workspace

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

    def own(self, name: str, x: Tensor) -> Tensor:
        """A buffer `name` of the strip of (B, h, w, heads, d), from row 2r on; zero elsewhere."""
        columns = x[self.images, :, self.columns, self.heads]
        return self._buffer(name, columns, 2 * self.radius, 0, 0, 0.0)

    def around(self, name: str, x: Tensor, outside: float = 0.0) -> Tensor:
        """A buffer `name` of the strip and its halo, from row r on; `outside` elsewhere."""
        columns = x[self.images, :, self.inside, self.heads]
        return self._buffer(name, columns, self.radius, self.before, self.after, outside)

    def _buffer(
        self, name: str, x: Tensor, first: int, before: int, after: int, outside: float
    ) -> Tensor:
        rows, width = math.prod(self.sides), before + x.shape[2] + after
        buffer = self.space.take(name, rows + 2 * self.radius, width, x.shape[4])
        buffer[:first] = outside
        buffer[first + rows :] = outside
        planes = self.planes(buffer[first : first + rows])
        planes[:, :, self.height :] = outside
        planes[:, :, :, :before] = outside
        planes[:, :, :, width - after :] = outside
        planes[:, :, : self.height, before : width - after] = x.permute(0, 3, 1, 2, 4)
        return buffer

    def write(self, target: Tensor, rows: Tensor) -> None:
        """Writes the strip, (all rows of all planes, width, d), into (B, h, w, heads, d)."""
        target = target[self.images, :, self.columns, self.heads]
        target.copy_(self.planes(rows)[:, :, : self.height].permute(0, 2, 3, 1, 4))

    def planes(self, rows: Tensor) -> Tensor:
        """(all rows of all planes, ...) as (images, heads, H, ...)."""
        return rows.unflatten(0, self.sides)

    def windows(self, buffer: Tensor) -> Tensor:
        """Each row of a buffer with the 2r below, (rows, (2r + 1) * width, d), overlapping."""
        _, width, dim = buffer.shape
        size = (math.prod(self.sides), (2 * self.radius + 1) * width, dim)
        return buffer.as_strided(size, (width * dim, dim, 1))

    def bias(self, slopes: Tensor) -> Tensor:
        """(heads, 1, width, (2r + 1) * halo width): ALiBi to base 2, -inf where the window ends.

        From strip to halo; the same for keys in the halo as for queries.
        """
        slopes = slopes[self.heads] * _LOG2_E
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
    space = _Workspace(q)
    plane = (h + 2 * radius) * _STRIP * (2 * radius + 1) * (_STRIP + 2 * radius)
    most = _LOGITS_CPU if q.device.type == "cpu" else _LOGITS
    groups = math.ceil(heads / max(most // plane, 1))
    num_heads = math.ceil(heads / groups)
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
            space=space,
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
        if has_kernels(q):
            from teachers.upsamplers import local_attention_kernels

            gradients = local_attention_kernels.differentiate(
                (q, k, v), slopes, (out, lse), d_out, ctx.radius
            )
            return *gradients, None, None
        dtype = _compute_dtype(q)
        d_q = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        d_k, d_v = torch.empty_like(d_q, dtype=k.dtype), torch.empty_like(d_q, dtype=v.dtype)
        with no_autocast(q):
            shift = torch.empty_like(lse)
            for rows in zip(*(x.split(_STRIP, 1) for x in (out, d_out, shift)), strict=True):
                torch.sum(rows[0] * rows[1], -1, keepdim=True, dtype=dtype, out=rows[2])
            for part in _parts(q, ctx.radius):
                _differentiate(part, (q, k, v), slopes, d_out, lse, shift, (d_q, d_k, d_v))
        return d_q.to(q.dtype), d_k, d_v, None, None


def _attend(
    part: _Part, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor | None
) -> None:
    """Writes the part's output, and its log-sum-exp where `lse` is given."""
    space, scale = part.space, q.shape[-1] ** -0.5 * _LOG2_E
    queries = part.own("queries", q)[2 * part.radius :].mul_(scale)
    keys, values = part.windows(part.around("keys", k)), part.windows(part.around("values", v))
    logits = space.product("logits", queries, keys.mT)
    part.planes(logits).add_(part.bias(slopes))
    part.mask_border(part.planes(logits))
    largest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(largest).exp2_()
    total = weights.sum(-1, keepdim=True)
    part.write(out, space.product("mixed", weights, values).div_(total))
    if lse is not None:
        part.write(lse, largest + total.log2())


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
    scale = q.shape[-1] ** -0.5
    space, r = part.space, part.radius
    keys, values = part.own("keys", k), part.own("values", v)
    queries = part.windows(part.around("queries", q).mul_(scale * _LOG2_E))
    d_outs = part.windows(part.around("d_outs", d_out))
    lses = part.windows(part.around("lses", lse, torch.inf)).mT
    shifts = part.windows(part.around("shifts", shift)).mT

    weights = space.product("weights", keys[2 * r :], queries.mT)
    part.planes(weights).add_(part.bias(slopes))
    weights.sub_(lses).exp2_()
    part.write(d_v, space.product("own", weights, d_outs))

    rows, width, visits = weights.shape
    all_d_logits = space.take("d_logits", rows + 2 * r, width, visits)
    all_d_logits[: 2 * r] = 0  # zeros above, as `keys` has them
    d_logits = torch.bmm(values[2 * r :], d_outs.mT, out=all_d_logits[2 * r :])
    d_logits.sub_(shifts).mul_(weights)
    part.planes(d_logits)[:, :, part.height :] = 0
    part.write(d_k, space.product("own", d_logits, queries).div_(_LOG2_E))

    # The same numbers by query row: what lies 2r - i rows above, in the i-th row of its window.
    row, m = d_logits.stride(0), part.halo_width
    size, stride = (rows, 2 * r + 1, width, m), (row, row - m, visits, 1)
    by_query = space.take("weights", *size).copy_(all_d_logits.as_strided(size, stride, 2 * r * m))
    halo = space.product("halo", by_query.flatten(1, 2).mT, part.windows(keys))
    halo = part.planes(halo)[:, :, r : r + part.height, part.before : m - part.after]
    d_q = d_q[part.images, :, part.inside, part.heads]
    d_q.add_(halo.permute(0, 2, 3, 1, 4), alpha=scale)
