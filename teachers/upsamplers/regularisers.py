"""Optional regularisers of the consistency loss, from FeatUp (arXiv 2403.10516) and FeatSharp.

The runs of the FeatSharp paper (arXiv 2502.16025) use none. Pairs of cells are weighted by the
geometric mean of their uncertainty weights.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_CRF_CELLS = 1000  # samples for each image; the pairs are their square
_CRF_DIM = 128  # channels of the random projection
_MMD_CELLS = 4000  # samples for a batch


def total_variation(maps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Smooth L1 distance of vertical and of horizontal neighbours, averaged over the two.

    Args:
        maps: (B, D, H, W), at least two cells along each axis.
        weights: (B, 1, H, W), positive; None for ones.

    Returns:
        ().
    """
    terms = []
    for axis in (2, 3):
        length = maps.shape[axis] - 1
        near, far = maps.narrow(axis, 0, length), maps.narrow(axis, 1, length)
        distance = F.smooth_l1_loss(near, far, reduction="none").mean(1, keepdim=True)
        if weights is not None:
            pair = weights.narrow(axis, 0, length) * weights.narrow(axis, 1, length)
            distance = distance * pair.sqrt()
        terms.append(distance.mean())
    return (terms[0] + terms[1]) / 2


def sampled_crf(
    maps: Tensor, images: Tensor, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Penalises feature distance between cells that are close and of similar colour.

    The mean over pairs of sampled cells of kernel * squared distance, with FeatSharp's kernel
    exp(-|dxy|^2 / 0.2 - |drgb|^2 / 0.3), xy in [0, 1]. Features of more than 128 channels are
    projected to 128 first, with a random orthonormal matrix for each image.

    Args:
        maps: (B, D, H, W).
        images: (B, 3, H', W') in [0, 1]; averaged over the cells of the map.
        generator: on the CPU.
        weights: (B, 1, H, W), positive; None for ones.

    Returns:
        ().
    """
    batch, dim, height, width = maps.shape
    count = min(_CRF_CELLS, height * width)
    cells = torch.stack(
        [torch.randperm(height * width, generator=generator)[:count] for _ in range(batch)]
    ).to(maps.device)
    colours = F.adaptive_avg_pool2d(images, (height, width)).to(maps)
    colours, features = _take(colours, cells), _take(maps, cells)
    if dim > _CRF_DIM:
        gaussian = torch.randn(batch, dim, _CRF_DIM, generator=generator)
        features = features @ torch.linalg.qr(gaussian)[0].to(maps)
    y, x = (cells // width + 0.5) / height, (cells % width + 0.5) / width
    places = torch.stack([y, x], dim=-1).to(maps)
    kernel = (-_squares(places, places) / 0.2 - _squares(colours, colours) / 0.3).exp()
    if weights is not None:
        root = _take(weights, cells).sqrt()
        kernel = kernel * root * root.mT
    return (kernel * _squares(features, features)).mean() / features.shape[-1]


def maximum_mean_discrepancy(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Distance between the distributions of low- and high-resolution features.

    The unbiased squared MMD with a Gaussian kernel exp(-d^2 / median), with the median over pairs
    across the two. Each low-resolution cell is paired with the most similar high-resolution cell
    inside it (the public code takes the least similar); up to 4000 such pairs of this process's
    batch are compared.

    Args:
        low: (B, D, h, w).
        high: (B, D, fh * h, fw * w).
        generator: on the CPU.

    Returns:
        (); can be negative, being an unbiased estimate.
    """
    h, w = low.shape[-2:]
    blocks = rearrange(high, "b d (h fh) (w fw) -> (b h w) (fh fw) d", h=h, w=w)
    cells = rearrange(low, "b d h w -> (b h w) d")
    chosen = torch.randperm(len(cells), generator=generator)[:_MMD_CELLS].to(low.device)
    cells, blocks = cells[chosen], blocks[chosen]
    with torch.no_grad():
        nearest = (blocks - cells[:, None]).square().sum(-1).argmin(1)
    near = blocks[torch.arange(len(blocks), device=blocks.device), nearest]
    across = _squares(cells, near)
    bandwidth = across.detach().median().clamp(min=1e-12)
    within = [(-_squares(rows, rows) / bandwidth).exp() for rows in (cells, near)]
    count = len(cells)
    # The means within each exclude pairs of a cell with itself, whose kernel is one.
    same = sum((kernel.sum() - kernel.trace()) / (count * (count - 1)) for kernel in within)
    return same - 2 * (-across / bandwidth).exp().mean()


def _take(maps: Tensor, cells: Tensor) -> Tensor:
    """Features (B, K, D) of a map at K cells of each image, with row-major indices (B, K)."""
    flat = rearrange(maps, "b d h w -> b d (h w)")
    taken = flat.gather(2, cells[:, None].expand(-1, maps.shape[1], -1))
    return rearrange(taken, "b d k -> b k d")


def _squares(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances (..., K, L) of all pairs of (..., K, D) and (..., L, D)."""
    norms = rows.square().sum(-1)[..., :, None] + others.square().sum(-1)[..., None, :]
    return (norms - 2 * rows @ others.mT).clamp(min=0)
