"""Terms that FeatUp and FeatSharp may add to the consistency loss; the paper's runs use none.

Each costs time on every step, so the objective calls one only where its weight is above zero.
Cells are weighted by the geometric mean of the uncertainty weights of the two that are compared.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_CRF_CELLS = 1000  # sampled an image; pairs are the square of it
_CRF_DIM = 128  # channels of the random projection
_MMD_CELLS = 4000  # sampled a batch


def total_variation(maps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Smooth L1 distance of vertical and horizontal neighbours, averaged over both kinds.

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
    """Pulls cells together that are near each other and of the same colour.

    The mean over pairs of sampled cells of kernel * squared distance, with FeatSharp's kernel
    exp(-|dxy|^2 / 0.2 - |drgb|^2 / 0.3), xy in [0, 1]. Distances are measured after a random
    orthonormal projection to 128 channels, drawn for each image, where there are more.

    Args:
        maps: (B, D, H, W).
        images: (B, 3, H', W') in [0, 1]; averaged to the grid of the map.
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

    The unbiased squared MMD with a Gaussian kernel exp(-d^2 / median), the median over pairs across
    the two. Each low-resolution cell is paired with the nearest high-resolution one inside it (the
    public code takes the farthest), and up to 4000 such pairs of this process's batch are compared.

    Args:
        low: (B, D, h, w).
        high: (B, D, fh * h, fw * w).
        generator: on the CPU.

    Returns:
        (); below zero too, as an unbiased estimate can be.
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
    # Pairs of a cell with itself, whose kernel is one, are left out of the means within each.
    same = sum((kernel.sum() - kernel.trace()) / (count * (count - 1)) for kernel in within)
    return same - 2 * (-across / bandwidth).exp().mean()


def _take(maps: Tensor, cells: Tensor) -> Tensor:
    """The features (B, K, D) of a map at K cells of each image, (B, K) indices in raster order."""
    flat = rearrange(maps, "b d h w -> b d (h w)")
    taken = flat.gather(2, cells[:, None].expand(-1, maps.shape[1], -1))
    return rearrange(taken, "b d k -> b k d")


def _squares(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances (..., K, L) of all pairs of (..., K, D) and (..., L, D)."""
    norms = rows.square().sum(-1)[..., :, None] + others.square().sum(-1)[..., None, :]
    return (norms - 2 * rows @ others.mT).clamp(min=0)
