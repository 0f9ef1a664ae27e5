"""Dot products of each position's query with the keys around it, in tiles.

The 2r x 2r queries of a tile need the 4r x 4r keys around it: one small matrix product has all of
their products, and a strided view selects the required band. Each key is read at most four times,
and no tensor of (2r + 1)^2 keys for each position is needed.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tiles of one product. With their keys they take 1.4 MB at radius 3, to fit in the cache of a core;
# on a GPU 160 MB, for fewer launches.
_CPU_TILES, _GPU_TILES = 36, 4096


def neighbour_products(queries: Tensor, keys: Tensor, radius: int) -> Tensor:
    """out[b, y, x, i, j] = <queries[b, y, x], keys[b, y + i - radius, x + j - radius]>.

    Beyond the border the keys are reflected about the outermost position, repeatedly where the map
    is smaller than the radius. The gradients are exact and deterministic. There is no second
    derivative.

    Args:
        queries: (B, H, W, D).
        keys: (B, H, W, D), same dtype.
        radius: at least 1.

    Returns:
        (B, H, W, 2 radius + 1, 2 radius + 1).
    """
    out: Tensor = _NeighbourProducts.apply(queries, keys, radius)
    return out


def reflected(positions: Tensor, size: int) -> Tensor:
    """Reflects positions beyond a line of `size` cells about its outermost cells."""
    if size == 1:
        return torch.zeros_like(positions)
    positions = positions.abs() % (2 * size - 2)
    return torch.minimum(positions, 2 * size - 2 - positions)


class _NeighbourProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, radius: int) -> Tensor:
        ctx.save_for_backward(queries, keys)
        ctx.radius = radius
        batch, height, width, _ = queries.shape
        t, taps = 2 * radius, 2 * radius + 1
        q, k = _padded_queries(queries, t), _padded_keys(keys, t)
        rows, columns = q.shape[1] // t, q.shape[2] // t
        out = q.new_empty(batch, rows, t, columns, t, taps, taps)
        for images, first, last in _pieces(batch, rows, columns, q.device):
            q_tiles = _tiles(q[images, first * t : last * t], t)
            k_tiles = _windows(k[images, first * t : (last + 1) * t], t)
            band = _band(q_tiles @ k_tiles.mT, last - first, columns, t)
            out[images, first:last] = band.transpose(2, 3)
        return out.view(batch, rows * t, columns * t, taps, taps)[:, :height, :width]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, keys = ctx.saved_tensors
        batch, height, width, depth = queries.shape
        t, taps = 2 * ctx.radius, 2 * ctx.radius + 1
        q, k = _padded_queries(queries, t), _padded_keys(keys, t)
        rows, columns = q.shape[1] // t, q.shape[2] // t
        padding = (0, 0, 0, 0, 0, columns * t - width, 0, rows * t - height)
        grads = F.pad(grad, padding).view(batch, rows, t, columns, t, taps, taps)
        to_q, to_k = torch.empty_like(q), torch.zeros_like(k)
        q_blocks = to_q.view(batch, rows, t, columns, t, depth)
        k_blocks = to_k.view(batch, rows + 1, t, columns + 1, t, depth)
        for images, first, last in _pieces(batch, rows, columns, q.device):
            q_tiles = _tiles(q[images, first * t : last * t], t)
            k_tiles = _windows(k[images, first * t : (last + 1) * t], t)
            product = q.new_zeros(len(q_tiles), t * t, 4 * t * t)
            _band(product, last - first, columns, t).copy_(
                grads[images, first:last].transpose(2, 3)
            )
            shape = (-1, last - first, columns)
            back = (product @ k_tiles).view(*shape, t, t, depth)
            q_blocks[images, first:last] = back.transpose(2, 3)
            # The windows overlap by half, so each quarter of a window is a block of padded keys.
            quarters = (product.mT @ q_tiles).view(*shape, 2, t, 2, t, depth)
            for a in range(2):
                for b in range(2):
                    part = quarters[:, :, :, a, :, b].transpose(2, 3)
                    k_blocks[images, first + a : last + a, :, b : b + columns] += part
        to_k = _fold_border(_fold_border(to_k, 1, height, ctx.radius), 2, width, ctx.radius)
        return to_q[:, :height, :width], to_k, None


def _pieces(
    batch: int, rows: int, columns: int, device: torch.device
) -> Iterator[tuple[slice, int, int]]:
    """Cuts the tiles into pieces with small products: images, first and last row of tiles."""
    tiles = _CPU_TILES if device.type == "cpu" else _GPU_TILES
    images, step = max(1, tiles // (rows * columns)), max(1, tiles // columns)
    for image in range(0, batch, images):
        for first in range(0, rows, step):
            yield slice(image, image + images), first, min(first + step, rows)


def _padded_queries(queries: Tensor, t: int) -> Tensor:
    """Pads both axes with zeros to whole tiles."""
    height, width = queries.shape[1:3]
    return F.pad(queries, (0, 0, 0, -width % t, 0, -height % t)).contiguous()


def _padded_keys(keys: Tensor, t: int) -> Tensor:
    """Pads whole tiles by half a reflected tile on each side; (B, H', W', D) contiguous."""
    for dim in (1, 2):
        size = keys.shape[dim]
        places = torch.arange(-(t // 2), size + -size % t + t // 2, device=keys.device)
        # Only queries of the padding, which are cut off, use keys beyond the radius.
        keys = keys.index_select(dim, reflected(places, size))
    return keys


def _tiles(queries: Tensor, t: int) -> Tensor:
    """(B, n t, m t, D) to (B n m, t t, D)."""
    return rearrange(queries, "b (n i) (m j) d -> (b n m) (i j) d", i=t, j=t)


def _windows(keys: Tensor, t: int) -> Tensor:
    """The 2t x 2t keys around each tile, (B, (n + 1) t, (m + 1) t, D) to (B n m, 4 t t, D)."""
    windows = keys.unfold(1, 2 * t, t).unfold(2, 2 * t, t)
    return rearrange(windows, "b n m d i j -> (b n m) (i j) d")


def _band(product: Tensor, n: int, m: int, t: int) -> Tensor:
    """A view of (B n m, t t, 2t 2t): products with neighbours, (B, n, m, t, t, t + 1, t + 1)."""
    row, tile = 4 * t * t, 4 * t**4
    strides = (n * m * tile, m * tile, tile, t * row + 2 * t, row + 1, 2 * t, 1)
    return product.as_strided((len(product) // (n * m), n, m, t, t, t + 1, t + 1), strides)


def _fold_border(grad: Tensor, dim: int, size: int, radius: int) -> Tensor:
    """The transpose of reflection along an axis: adds each border cell to its origin."""
    out = grad.narrow(dim, radius, size).clone()
    outside = torch.cat([torch.arange(-radius, 0), torch.arange(size, size + radius)])
    for place, origin in zip(outside.tolist(), reflected(outside, size).tolist(), strict=True):
        out.select(dim, origin).add_(grad.select(dim, place + radius))
    return out
