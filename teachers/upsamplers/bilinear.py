"""The baseline: bilinear interpolation of the encoder's own map."""

from torch import Tensor

from teachers.upsamplers.resize import enlarge
from teachers.upsamplers.upsampler import FactorConfig, SinglePassUpsampler


class BilinearConfig(FactorConfig):
    """Bilinear interpolation."""

    kind: str = "bilinear"


class Bilinear(SinglePassUpsampler):
    """Resizes the image to the encoder's native resolution and interpolates its map."""

    Config = BilinearConfig

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples; see `SinglePassUpsampler.dense`. The images are not used."""
        return enlarge(features, self.factor)
