"""S2: interpolated whole-image features and tile features, mixed with fixed weights.

The two-scale baseline of FeatSharp's tables (arXiv 2502.16025), after S2-Wrapper
(arXiv 2403.13043), which concatenates the channels of the scales instead of adding them.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from teachers.features import Features, FeatureSpec
from teachers.upsamplers.resize import enlarge
from teachers.upsamplers.tile import encode_tiles, num_tile_forwards
from teachers.upsamplers.upsampler import Encode, FactorConfig, UpsampledFeatures, Upsampler


class S2Config(FactorConfig):
    """Two scales.

    Attributes:
        beta: weight of the tiles; the interpolated map has 1 - beta. None concatenates both,
            unweighted, to twice the encoder's channels.
    """

    kind: str = "s2"
    beta: Annotated[float, Field(ge=0, le=1)] | None = 0.8


class S2(Upsampler):
    """(1 - beta) * bilinear + beta * tiles, or the channels of both, [bilinear, tiles].

    Args:
        spec: what the encoder returns and accepts.
        factor: (fh, fw), tiles per axis.
        beta: weight of the tiles, in [0, 1]; None to concatenate.
    """

    Config = S2Config

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int], beta: float | None) -> None:
        super().__init__(spec, factor)
        self.beta = beta

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples; see `Upsampler.forward`."""
        low, tiles = encode_tiles(images, encode, self.spec, self.factor)
        smooth = enlarge(low.spatial, self.factor)
        if self.beta is None:
            dense = torch.cat([smooth, tiles], dim=1)
        else:
            dense = torch.lerp(smooth, tiles, self.beta)
        return UpsampledFeatures(low, Features(low.summary, dense))

    @property
    def spatial_dim(self) -> int:
        """The encoder's channels, or twice as many where both maps are concatenated."""
        return self.spec.spatial_dim * (2 if self.beta is None else 1)

    @property
    def num_forwards(self) -> int:
        """The whole image and its tiles."""
        return num_tile_forwards(self.factor)
