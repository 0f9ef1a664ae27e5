"""The baseline of every gain: bilinear interpolation of the encoder's own map."""

from typing import ClassVar

from torch import Tensor

from teachers.upsamplers.resize import Factor, enlarge
from teachers.upsamplers.upsampler import SinglePassUpsampler, UpsamplerConfig


class BilinearConfig(UpsamplerConfig):
    """Bilinear interpolation.

    Attributes:
        factor: how many times denser the map becomes; one number, or [height, width].
    """

    kind: str = "bilinear"
    factor: Factor


class Bilinear(SinglePassUpsampler):
    """Resizes the image to the encoder's native resolution and interpolates its map."""

    Config: ClassVar[type[UpsamplerConfig]] = BilinearConfig

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples; see `SinglePassUpsampler.dense`. The image does not matter."""
        return enlarge(features, self.factor)
