"""FeatUp as FeatSharp's tables run it: joint bilateral upsampling alone (arXiv 2403.10516)."""

from typing import Any, ClassVar, Self

from pydantic import PositiveFloat
from torch import Tensor

from teachers.features import FeatureSpec
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.jbu import JBU
from teachers.upsamplers.resize import Factor, scaled
from teachers.upsamplers.upsampler import SinglePassUpsampler, UpsamplerConfig


class FeatUpConfig(UpsamplerConfig):
    """Joint bilateral upsampling.

    Attributes:
        factor: how many times denser the map becomes; one number, or [height, width].
        sigma: where the width of the spatial kernel starts, see `JBU`; published as 1.
    """

    kind: str = "featup"
    factor: Factor
    sigma: PositiveFloat = 0.3


class FeatUp(SinglePassUpsampler):
    """Upsamples the encoder's map along the image's edges.

    Without the fix-up convolutions of the first publication, which leave the feature space.

    Args:
        spec: what the encoder returns and accepts.
        factor: (fh, fw), how many times denser the map becomes, per axis.
        sigma: where the width of the spatial kernel starts.
    """

    Config: ClassVar[type[UpsamplerConfig]] = FeatUpConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int], sigma: float) -> None:
        super().__init__(spec, factor)
        self.jbu = JBU(factor, sigma=sigma)

    @classmethod
    def from_config(cls, config: Any, spec: FeatureSpec) -> Self:
        """Builds it for an encoder with `spec`."""
        return cls(spec, config.factor, config.sigma)

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples a map; see `SinglePassUpsampler.dense`."""
        size = scaled((features.shape[-2], features.shape[-1]), self.factor)
        return self.jbu(features, guidance(images, size))
