"""Teachers and a benchmark that tests share."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.runtime import distributed
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher

DIM = 8
SPEC = FeatureSpec(summary_dim=3, spatial_dim=DIM, patch_size=4, resolution=(12, 20))


class Curved(Teacher):
    """A map that is no linear function of the image; keeps the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__(SPEC, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, DIM, 4, 4)
        self.seen: list[int] = []

    def extract(self, images: Tensor) -> Features:
        self.seen.append(len(images))
        maps = self.net(images)
        return Features(images.mean((2, 3)), maps + maps.mean((2, 3), keepdim=True).sin())


class Ramp(Benchmark):
    """The largest feature of a fixed image; draws from every default generator on the way."""

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        random.random(), torch.rand(1), np.random.rand()
        image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).to(encoder.mean.device)
        figure = float(encoder(image).spatial.abs().max())
        if distributed.rank() == 0:
            Image.new("RGB", (2, 2)).save(folder / "ramp.png")
        return Measurement({"largest": figure}, {})
