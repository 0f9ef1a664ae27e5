"""SAPA: similarity-aware point affiliation (Lu et al., NeurIPS 2022, arXiv 2209.12866).

Each output cell is the mean of the 5 x 5 low-resolution features around it, weighted by the softmax
of the inner products of its embedding with theirs. This is the base form, without gate. The paper
embeds a decoder's high-resolution features; a frozen encoder has none, so the image is embedded
instead. Any integer factor is one step, where the paper stacks steps of two. Windows are truncated
at the border.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from teachers.features import FeatureSpec
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.precision import at_least_float32
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.upsampler import FactorConfig, SinglePassUpsampler
from teachers.upsamplers.window import window_upsample

_EMBEDDING_DIM = 64
_RADIUS = 2  # 5 x 5 cells


class SAPAConfig(FactorConfig):
    """SAPA."""

    kind: str = "sapa"


class SAPA(SinglePassUpsampler):
    """Softmax of embedded image times embedded features, over 5 x 5 features."""

    Config = SAPAConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int]) -> None:
        super().__init__(spec, factor)
        self.query = nn.Conv2d(3, _EMBEDDING_DIM, 1)
        self.key = nn.Linear(
            spec.spatial_dim, _EMBEDDING_DIM, bias=False
        )  # would cancel in softmax

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples; see `SinglePassUpsampler.dense`."""
        size = scaled((features.shape[-2], features.shape[-1]), self.factor)
        queries = self.query(guidance(images, size))
        tokens = at_least_float32(rearrange(features, "b d h w -> b h w d"))
        keys = self.key(F.layer_norm(tokens, tokens.shape[-1:]))
        keys = rearrange(keys, "b h w d -> b d h w")
        return window_upsample(features, queries, keys, radius=_RADIUS, heads=1, scale=1.0)
