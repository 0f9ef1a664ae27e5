"""Trains or evaluates with the resizing of the public code.

    python -m tests.quality.aliased train RECIPE

An experiment on the lower fidelity at factor 3 in the FeatSharp paper (arXiv 2502.16025). As in the
public code, no resize is antialiased, views and guidance included, the downsampler's windows are
off by (f - 1) / 2 cells, and its softmax includes zeros beyond the border. Evaluation uses the same
resizing as training, as for the published figures.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import evaluate
from distill.benchmarks import upsampling
from distill.tasks import upsampler_task
from teachers.upsamplers import downsampler, trained, views
from tests.quality import train_together

_interpolate = F.interpolate


def interpolate(images: Tensor, size: Any = None, **options: Any) -> Tensor:
    """`F.interpolate` that never antialiases."""
    return _interpolate(images, size, **options | {"antialias": False})


def point_pool(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation in place of the average over each cell."""
    return _interpolate(images, size, mode="bilinear", align_corners=False)


def warp_images(
    images: Tensor,
    homographies: Tensor,
    size: tuple[int, int],
    magnifications: Sequence[float] = (),
) -> Tensor:
    """Views at the base's size, then resized by point sampling."""
    repeated = images.repeat_interleave(homographies.shape[1], 0)
    base = (images.shape[-2], images.shape[-1])
    return point_pool(views.warp(repeated, homographies.flatten(0, 1), base), size)


class OffCentre(downsampler.AttentionDownsampler):
    """Windows of 2f + 1 taps around the first cell of each f x f, with zeros beyond the border."""

    def __init__(
        self, dim: int, factor: tuple[int, int], kernel: tuple[int, int] | None = None
    ) -> None:
        super().__init__(dim, factor)
        self.kernel = (2 * factor[0] + 1, 2 * factor[1] + 1)
        y, x = ((torch.arange(k) - k // 2) / f for f, k in zip(factor, self.kernel, strict=True))
        self.tap_bias = nn.Parameter(-6 * (y[:, None] ** 2 + x**2))

    def _windows(self, maps: Tensor, beyond: float) -> Tensor:
        beyond = 0.0 if beyond == -torch.inf else beyond
        (top, left), (bottom, right) = self.factor, (1, 1)
        padded = F.pad(maps, (left, right, top, bottom), value=beyond)
        return padded.unfold(2, self.kernel[0], self.factor[0]).unfold(
            3, self.kernel[1], self.factor[1]
        )


def patch() -> None:
    """Replaces the functions of this process."""
    for name, modules, value in (
        ("interpolate", (F,), interpolate),
        ("adaptive_avg_pool2d", (F,), point_pool),
        ("warp_images", (views, upsampler_task, upsampling), warp_images),
        ("AttentionDownsampler", (downsampler, trained, upsampler_task), OffCentre),
    ):
        for module in modules:
            assert hasattr(module, name), f"{module.__name__}.{name} has moved"
            setattr(module, name, value)


def main() -> None:
    """`train` or `evaluate`, then the arguments of that command."""
    commands = {"train": train_together.main, "evaluate": evaluate.main}
    command = commands[sys.argv.pop(1)]
    patch()
    command()


if __name__ == "__main__":
    main()
