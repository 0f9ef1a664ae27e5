"""Teachers, a head and a benchmark that tests share."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.runtime import distributed
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher

DIM = 8
SPEC = FeatureSpec(summary_dim=3, spatial_dim=DIM, patch_size=4, resolution=(12, 20))


class Patches(Teacher):
    """One linear map of each patch, so that a tile has the map of its place in the image.

    Attributes:
        seen: images, height and width of every batch.
    """

    mean_colour, std_colour = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def __init__(self, spec: FeatureSpec = SPEC, chunk_size: int | None = None) -> None:
        super().__init__(spec, mean=self.mean_colour, std=self.std_colour, chunk_size=chunk_size)
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, spec.spatial_dim, spec.patch_size, spec.patch_size)
        self.seen: list[tuple[int, ...]] = []

    @property
    def batches(self) -> list[int]:
        """Images of every batch."""
        return [count for count, *_ in self.seen]

    def extract(self, images: Tensor) -> Features:
        self.seen.append((len(images), *images.shape[2:]))
        return Features(self.summary(images), self.net(images))

    def summary(self, images: Tensor) -> Tensor | None:
        return None if self.spec.summary_dim is None else images.mean((2, 3))


class Curved(Patches):
    """A map that is no linear function of the image."""

    mean_colour, std_colour = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def extract(self, images: Tensor) -> Features:
        summary, maps = super().extract(images)
        return Features(summary, maps + maps.mean((2, 3), keepdim=True).sin())


class MeanColours(Teacher):
    """The mean colour of each patch, and its powers as four layers.

    Attributes:
        seen: every batch, normalised.
    """

    num_layers = 4

    def __init__(
        self,
        patch_size: int,
        resolution: tuple[int, int],
        *,
        any_resolution: bool = False,
        mean: tuple[float, float, float] = (0, 0, 0),
        std: tuple[float, float, float] = (1, 1, 1),
    ) -> None:
        spec = FeatureSpec(
            summary_dim=None,
            spatial_dim=3,
            patch_size=patch_size,
            resolution=resolution,
            any_resolution=any_resolution,
        )
        super().__init__(spec, mean=mean, std=std)
        self.seen: list[Tensor] = []

    def extract(self, images: Tensor) -> Features:
        self.seen.append(images)
        return Features(None, self.extract_layers(images, [0])[0])

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        return [F.avg_pool2d(images, self.spec.patch_size) ** (i + 1) for i in indices]


class Denormalising(nn.Module):
    """A probe's head that turns maps of the baseline `pixels` into colours again.

    Args:
        channels: how many of them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, maps: Tensor) -> Tensor:
        return maps[:, : self.channels] * 0.25 + 0.5


class Ramp(Benchmark):
    """The largest feature of a fixed image; draws from every default generator on the way."""

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        random.random(), torch.rand(1), np.random.rand()
        image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).to(encoder.mean.device)
        figure = float(encoder(image).spatial.abs().max())
        if distributed.rank() == 0:
            Image.new("RGB", (2, 2)).save(folder / "ramp.png")
        return Measurement({"largest": figure}, {})
