"""FeatUp as FeatSharp's tables run it: joint bilateral upsampling alone (arXiv 2403.10516)."""

from typing import ClassVar

from torch import Tensor

from teachers.features import Features, FeatureSpec
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.jbu import JBU
from teachers.upsamplers.resize import Factor, resize
from teachers.upsamplers.upsampler import Encode, UpsampledFeatures, Upsampler, UpsamplerConfig


class FeatUpConfig(UpsamplerConfig):
    """Joint bilateral upsampling.

    Attributes:
        factor: how many times denser the map becomes; one number, or [height, width].
    """

    kind: str = "featup"
    factor: Factor


class FeatUp(Upsampler):
    """Encodes the image at native resolution and upsamples its map along the image's edges.

    Without the fix-up convolutions of the first publication, which leave the feature space.
    """

    Config: ClassVar[type[UpsamplerConfig]] = FeatUpConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int]) -> None:
        super().__init__(spec, factor)
        self.jbu = JBU(factor)

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples; see `Upsampler.forward`."""
        low = encode(resize(images, self.spec.resolution))
        h, w = low.spatial.shape[-2:]
        guide = guidance(images, (self.factor[0] * h, self.factor[1] * w))
        return UpsampledFeatures(low, Features(low.summary, self.jbu(low.spatial, guide)))

    @property
    def num_forwards(self) -> int:
        """One."""
        return 1
