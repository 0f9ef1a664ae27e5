"""Joint bilateral upsampling of FeatUp (arXiv 2403.10516), as simplified in FeatSharp.

One level upsamples a map to the grid of its guidance: bilinear interpolation, then at each position
a 7 x 7 kernel that favours neighbours of similar colour,

    K = softmax over offsets o of  tau <k(p), k(p + o)> - |o / r|^2 / (2 sigma^2),

the normalised product of the published range and space kernels, whose amplitudes cancel. Both
steps are computed as one sum over low-resolution cells, see `folded_filter`.
"""

import math

import torch
from torch import Tensor, nn

from teachers.upsamplers.folded_filter import upsample_and_filter
from teachers.upsamplers.guidance import area_resize
from teachers.upsamplers.neighbour_products import neighbour_products
from teachers.upsamplers.precision import at_least_float32, no_autocast

_LOWEST, _HIGHEST = 1e-4, 1e4  # temperatures, as published


class JBULevel(nn.Module):
    """One joint bilateral upsampling, to the size of the guidance.

    Args:
        key_dim: channels of the keys that are compared.
        radius: radius of the kernel, in cells of the output.
        sigma: initial width of the spatial kernel, as a share of `radius`.
    """

    def __init__(self, key_dim: int = 32, radius: int = 3, sigma: float = 1.0) -> None:
        super().__init__()
        self.radius = radius
        self.project = nn.Sequential(nn.Linear(3, key_dim), nn.GELU(), nn.Linear(key_dim, key_dim))
        self.log_temperature = nn.Parameter(torch.zeros(1))
        self.log_sigma = nn.Parameter(torch.full((1,), math.log(sigma)))

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Upsamples.

        Args:
            source: (B, D, h, w), of any dtype.
            guidance: (B, 3, H, W), normalised; H and W need not be multiples of h and w.

        Returns:
            (B, D, H, W) in the dtype of `source` and in the memory format channels_last; a convex
            combination of the source's vectors.
        """
        with no_autocast(source):
            return upsample_and_filter(source, self.kernels(guidance))

    def kernels(self, guidance: Tensor) -> Tensor:
        """The kernels (B, H, W, 2 radius + 1, 2 radius + 1) of guidance (B, 3, H, W).

        They are positive, with sum one, and in float32 at least, under autocast too.
        """
        keys = self.project(guidance.permute(0, 2, 3, 1).to(self.log_sigma.dtype))
        keys = at_least_float32(keys)
        temperature = self.log_temperature.exp().clamp(_LOWEST, _HIGHEST)
        logits = neighbour_products(temperature * keys, keys, self.radius)
        taps = torch.arange(-self.radius, self.radius + 1, dtype=keys.dtype, device=keys.device)
        offsets = taps / self.radius
        distance = offsets[:, None] ** 2 + offsets**2
        logits = logits - distance / (2 * (2 * self.log_sigma).exp())
        return logits.flatten(3).softmax(-1).view(logits.shape)


class JBU(nn.Module):
    """A stack of levels with prime factors, smallest first, each with its own parameters.

    A level has one prime of either axis, or 1 where that axis has none left: (4, 3) is (2, 3), then
    (2, 1). Factor (1, 1) has no level and returns its input.

    Args:
        factor: (fh, fw), how many times denser the map becomes, per axis.
        key_dim: channels of the keys that are compared.
        radius: radius of each level's kernel, in cells of its output.
        sigma: initial width of the spatial kernels, as a share of `radius`; 1 in the paper, which
            blurs more than bilinear interpolation.
    """

    def __init__(
        self, factor: tuple[int, int], *, key_dim: int = 32, radius: int = 3, sigma: float = 1.0
    ) -> None:
        super().__init__()
        self.steps = level_factors(factor)
        self.levels = nn.ModuleList(JBULevel(key_dim, radius, sigma) for _ in self.steps)

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Upsamples.

        Args:
            source: (B, D, h, w).
            guidance: (B, 3, H, W), normalised, at any size; each level averages it over the
                cells of its own grid.

        Returns:
            (B, D, fh h, fw w) in the dtype of `source`; in the memory format channels_last where
            there is a level.
        """
        for (fh, fw), level in zip(self.steps, self.levels, strict=True):
            h, w = source.shape[-2:]
            source = level(source, area_resize(guidance, (fh * h, fw * w)))
        return source


def level_factors(factor: tuple[int, int]) -> list[tuple[int, int]]:
    """The (height, width) factors of the levels of a stack."""
    by_rows, by_columns = (_primes(f) for f in factor)
    levels = max(len(by_rows), len(by_columns))
    padded = [primes + [1] * (levels - len(primes)) for primes in (by_rows, by_columns)]
    return list(zip(*padded, strict=True))


def _primes(n: int) -> list[int]:
    """The prime factors of n, ascending."""
    for p in range(2, n):
        if n % p == 0:
            return [p, *_primes(n // p)]
    return [n] if n > 1 else []
