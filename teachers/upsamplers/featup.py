"""FeatUp (arXiv 2403.10516) as in FeatSharp's tables: joint bilateral upsampling alone."""

from pydantic import PositiveFloat
from torch import Tensor

from teachers.features import FeatureSpec
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.jbu import JBU
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.upsampler import FactorConfig, SinglePassUpsampler


class FeatUpConfig(FactorConfig):
    """Joint bilateral upsampling.

    Attributes:
        sigma: initial width of the spatial kernel, see `JBU`; 1 in the paper.
    """

    kind: str = "featup"
    sigma: PositiveFloat = 0.3


class FeatUp(SinglePassUpsampler):
    """Upsamples the encoder's map along the image's edges.

    Without the "fix-up" convolution of the public FeatUp code, whose output is no longer in the
    encoder's feature space.

    Args:
        spec: what the encoder returns and accepts.
        factor: (fh, fw), how many times denser the map becomes, per axis.
        sigma: initial width of the spatial kernel.
    """

    Config = FeatUpConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int], sigma: float) -> None:
        super().__init__(spec, factor)
        self.jbu = JBU(factor, sigma=sigma)

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples a map; see `SinglePassUpsampler.dense`."""
        size = scaled((features.shape[-2], features.shape[-1]), self.factor)
        return self.jbu(features, guidance(images, size))
