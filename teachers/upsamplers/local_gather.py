"""Weighted sums over small windows of a low-resolution map, one window for each output position.

All upsamplers with a kernel for each position end in this sum (CARAFE, SAPA, and joint bilateral
upsampling once its kernel is folded onto the low-resolution grid). As an embedding bag, it reads
each window once and needs no memory but its result. On a GPU it is computed by
`local_gather_kernels`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachers.upsamplers.precision import at_least_float32, has_kernels

_SUM = 0  # ATen's number for mode="sum"


def local_gather(source: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[b, :, y, x] = sum_ij weights[b, y, x, i, j] source[b, :, rows[y] + i, columns[x] + j].

    The gradients of `source` and `weights` are exact and deterministic, on a GPU too. There is no
    second derivative.

    Args:
        source: (B, D, h, w) floating point, fastest in the memory format channels_last.
        weights: (B, H, W, kh, kw) floating point; used in the dtype of `source`.
        rows: (H,) int64, the first row of each window, in [0, h - kh]. They are checked on the CPU:
            best keep them there, in pinned memory if there is a GPU.
        columns: (W,) int64, the first column of each window, in [0, w - kw].

    Returns:
        (B, D, H, W) in the dtype of `source` and in the memory format channels_last.

    Raises:
        ValueError: the shapes do not match, or a window leaves the map.
    """
    batch, _, *size = source.shape
    expected = (batch, len(rows), len(columns), *weights.shape[3:])
    if weights.ndim != 5 or weights.shape != expected:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for {batch} maps, {len(rows)} rows and "
            f"{len(columns)} columns; expected (B, H, W, kh, kw)"
        )
    for name, first, k, n in zip(
        ("rows", "columns"), (rows, columns), weights.shape[3:], size, strict=True
    ):
        if len(first) and (int(first.min()) < 0 or int(first.max()) + k > n):
            raise ValueError(
                f"{name} from {int(first.min())} to {int(first.max())}: a window of {k} on a map "
                f"of {n} cells must start in [0, {n - k}]"
            )
    rows, columns = (x.to(source.device, non_blocking=True) for x in (rows, columns))
    out: Tensor = _LocalGather.apply(source, weights, rows, columns)
    return out


class _LocalGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        table = _rows(source)
        ctx.save_for_backward(table, weights, rows, columns)
        ctx.source_shape = source.shape
        shape = (*weights.shape[:3], table.shape[1])
        if has_kernels(table):
            from teachers.upsamplers import local_gather_kernels

            size = (source.shape[2], source.shape[3])
            return _maps(local_gather_kernels.gather(table, weights, rows, columns, size), shape)
        cells = _window_cells(rows, columns, weights.shape, source.shape)
        bags = weights.to(table.dtype).reshape(cells.shape)
        out = F.embedding_bag(cells, table, per_sample_weights=bags, mode="sum")
        return _maps(out, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        table, weights, rows, columns = ctx.saved_tensors
        grads, shape = _rows(grad), ctx.source_shape
        to_source = to_weights = None
        if ctx.needs_input_grad[0]:
            pixels, places, starts = _transposed(rows, columns, weights.shape, shape)
            bags = weights.to(grads.dtype).flatten().index_select(0, places)
            summed = F.embedding_bag(pixels, grads, starts, per_sample_weights=bags, mode="sum")
            to_source = _maps(summed, (shape[0], *shape[2:], shape[1]))
        if ctx.needs_input_grad[1]:
            # Not every device has this operation in half precision.
            cells = _window_cells(rows, columns, weights.shape, shape)
            bags_of = torch.arange(len(cells), dtype=cells.dtype, device=cells.device)
            to_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                at_least_float32(grads),
                at_least_float32(table),
                cells.flatten(),
                bags_of * cells.shape[1],
                bags_of.repeat_interleave(cells.shape[1]),
                _SUM,
            )
            to_weights = to_weights.view(weights.shape).to(weights.dtype)
        return to_source, to_weights, None, None


def _rows(maps: Tensor) -> Tensor:
    """Converts (B, D, h, w) to contiguous (B h w, D), without a copy from channels_last memory.

    Embedding bags over a table with strided rows are 10 to 16 times slower. ATen's copy from NCHW
    is fast for matrices only, so the maps are transposed one by one.
    """
    b, d, h, w = maps.shape
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1).reshape(b * h * w, d)
    table = maps.new_empty(b, h * w, d)
    for each, target in zip(maps, table, strict=True):
        target.copy_(each.reshape(d, h * w).t())
    return table.view(b * h * w, d)


def _maps(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_rows`, with `shape` (B, h, w, D), without a copy."""
    return table.view(shape).permute(0, 3, 1, 2)


def _index_type(weights_shape: torch.Size, source_shape: torch.Size) -> torch.dtype:
    """int32 where the indices fit, which halves their memory."""
    largest = max(weights_shape.numel(), source_shape.numel())
    return torch.int32 if largest < 2**31 else torch.int64


def _window_cells(
    rows: Tensor, columns: Tensor, weights_shape: torch.Size, source_shape: torch.Size
) -> Tensor:
    """The table rows of each output position's window, (B H W, kh kw)."""
    batch, _, _, kh, kw = weights_shape
    h, w = source_shape[2:]
    ys = rows[:, None] + torch.arange(kh, device=rows.device)
    xs = columns[:, None] + torch.arange(kw, device=rows.device)
    ys, xs = (t.to(_index_type(weights_shape, source_shape)) for t in (ys * w, xs))
    images = torch.arange(batch, dtype=ys.dtype, device=rows.device) * (h * w)
    cells = ys[:, None, :, None] + xs[:, None, :]
    return (images[:, None, None, None, None] + cells).view(-1, kh * kw)


def _transposed(
    rows: Tensor, columns: Tensor, weights_shape: torch.Size, source_shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed sum: the output positions that read each source cell, and their weights.

    Along one axis, (window, tap) pairs are sorted by the cell that they read. The pairs of a cell
    of the map are the product of those of its row and its column, which gives the position of each
    without sorting the product.

    Returns:
        Output positions and indices into the flattened weights, (B H W kh kw) each, grouped by
        cell, and the start of each cell's group, (B h w).
    """
    batch, height, width, kh, kw = weights_shape
    h, w = source_shape[2:]
    kind = _index_type(weights_shape, source_shape)
    y, i, row, row_count, row_start = _by_cell(rows, kh, h)
    x, j, column, column_count, column_start = _by_cell(columns, kw, w)
    per_image = height * width * kh * kw
    starts = row_start[:, None] * (width * kw) + row_count[:, None] * column_start
    rank_y = torch.arange(len(row), device=rows.device) - row_start[row]
    rank_x = torch.arange(len(column), device=rows.device) - column_start[column]
    order = (starts[row][:, column] + rank_y[:, None] * column_count[column] + rank_x).flatten()
    pixel, place = y[:, None] * width + x, (y * width * kh + i)[:, None] * kw + (x * kh * kw + j)
    pixels, places = (
        torch.empty_like(order).scatter_(0, order, t.flatten()) for t in (pixel, place)
    )
    images = torch.arange(batch, device=rows.device)[:, None]
    return (
        (images * (height * width) + pixels).to(kind).flatten(),
        (images * per_image + places).flatten(),
        (images * per_image + starts.flatten()).to(kind).flatten(),
    )


def _by_cell(first: Tensor, taps: int, cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(window, tap, cell) of each pair along an axis, sorted by cell; count and start per cell."""
    cell = (first[:, None] + torch.arange(taps, device=first.device)).flatten()
    order = cell.argsort(stable=True)
    counts = (cell[:, None] == torch.arange(cells, device=first.device)).sum(0)
    return order // taps, order % taps, cell[order], counts, counts.cumsum(0) - counts
