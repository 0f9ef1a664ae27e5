"""The baseline of every gain: bilinear interpolation of the encoder's own map."""

from typing import ClassVar

from torch import Tensor

from teachers.features import Features
from teachers.upsamplers.resize import Factor, enlarge, resize
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
        return UpsampledFeatures(low, Features(low.summary, enlarge(low.spatial, self.factor)))

    @property
    def num_forwards(self) -> int:
        """One."""
        return 1
