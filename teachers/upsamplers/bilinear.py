"""The baseline of every gain: bilinear interpolation of the encoder's own map."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from teachers.features import Features
from teachers.upsamplers.resize import Factor, resize
from teachers.upsamplers.upsampler import Encode, UpsampledFeatures, Upsampler, UpsamplerConfig


class BilinearConfig(UpsamplerConfig):
    """Bilinear interpolation.

    Attributes:
        factor: how many times denser the map becomes; one number, or [height, width].
    """

    kind: str = "bilinear"
    factor: Factor


class Bilinear(Upsampler):
    """Resizes the image to the encoder's native resolution and interpolates its map."""

    Config: ClassVar[type[UpsamplerConfig]] = BilinearConfig

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples; see `Upsampler.forward`."""
        low = encode(resize(images, self.spec.resolution))
        h, w = self.spec.grid(*self.spec.resolution)
        size = (self.factor[0] * h, self.factor[1] * w)
        dense = F.interpolate(low.spatial, size, mode="bilinear", align_corners=False)
        return UpsampledFeatures(low, Features(low.summary, dense))

    @property
    def num_forwards(self) -> int:
        """One."""
        return 1
