"""An example of a user's own teacher: torchvision's SqueezeNet 1.0."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import squeezenet1_0

from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher, TeacherConfig
from teachers.upsamplers.resize import Size2d

MEAN = (123 / 255, 117 / 255, 104 / 255)


class SqueezeNetConfig(TeacherConfig):
    kind: str = "tests.quality.squeezenet:SqueezeNet"
    weights: Path
    resolution: Size2d = (224, 224)


class SqueezeNet(Teacher):
    """The last feature map; padding by (10, 9) px centres each cell on its 16 x 16 px."""

    Config = SqueezeNetConfig

    def __init__(self, config: Any) -> None:
        size = {"patch_size": 16, "resolution": config.resolution, "any_resolution": True}
        spec = FeatureSpec(summary_dim=None, spatial_dim=512, **size)
        super().__init__(spec, mean=MEAN, std=(1 / 255,) * 3)
        network = squeezenet1_0()
        arrays = np.load(config.weights)
        network.load_state_dict({n: torch.from_numpy(arrays[n]).float() for n in arrays})
        self.network = network.features

    def extract(self, images: Tensor) -> Features:
        return Features(None, self.network(F.pad(images, (10, 9, 10, 9), mode="reflect")))
