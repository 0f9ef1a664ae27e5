"""Teachers that tests share."""

import torch
from torch import Tensor, nn

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
