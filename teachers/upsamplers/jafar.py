"""JAFAR (arXiv 2506.11136): every output cell is a weighted mean of all low-resolution features.

Queries come from the image at the output grid, keys from the image at the encoder's grid, modulated
by the features there. The weights of the heads are averaged and applied to the raw features. There
is no value projection, so the result is a convex combination of the encoder's features.

The attention is computed for some queries at a time and recomputed in the backward pass, so that
the (B, heads, N, n) weights never exist as a whole.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teachers.features import FeatureSpec
from teachers.upsamplers.guidance_encoder import DIM, GuidanceEncoder, pointwise_encoder, projection
from teachers.upsamplers.precision import at_least_float32
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.upsampler import FactorConfig, SinglePassUpsampler

_HEADS = 4
_WEIGHTS_AT_ONCE = 2**21  # for one image, all heads; bounds memory to 8 MB in float32


def mean_attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention whose heads share the values: their weights are averaged, then applied.

    Args:
        queries: (B, N, D).
        keys: (B, n, D).
        values: (B, n, C).
        heads: number of heads; divides D.

    Returns:
        (B, N, C), within the range of the values.
    """
    q, k = (rearrange(x, "b n (e d) -> b e n d", e=heads) for x in (queries, keys))
    logits = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5)
    return at_least_float32(logits).softmax(-1).mean(1) @ values


def chunked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, heads: int, weights_at_once: int
) -> Tensor:
    """`mean_attention` for some queries at a time; exact, and so are its gradients.

    `weights_at_once` is the largest number of attention weights of one image at a time.
    """
    chunk = max(1, weights_at_once // (heads * keys.shape[1]))
    parts = [
        checkpoint(
            mean_attention, part, keys, values, heads, use_reentrant=False, preserve_rng_state=False
        )
        for part in queries.split(chunk, dim=1)
    ]
    return torch.cat(parts, dim=1)


class JAFARConfig(FactorConfig):
    """JAFAR."""

    kind: str = "jafar"


class JAFAR(SinglePassUpsampler):
    """Global attention from the image to features."""

    Config = JAFARConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int]) -> None:
        super().__init__(spec, factor)
        self.guide = GuidanceEncoder()
        self.semantic = pointwise_encoder(spec.spatial_dim)
        self.gamma = nn.Conv2d(DIM, DIM, 1)
        self.beta = nn.Conv2d(DIM, DIM, 1)
        self.query, self.key = projection(), projection()

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples; see `SinglePassUpsampler.dense`."""
        h, w = features.shape[-2:]
        high = scaled((h, w), self.factor)
        queries, keys = self.guide(images, (h, w), high)
        semantic = self.semantic(F.normalize(at_least_float32(features), dim=1))
        keys = self.gamma(semantic) * keys + self.beta(semantic)
        dense = chunked_attention(
            self.query(at_least_float32(rearrange(queries, "b d h w -> b (h w) d"))),
            self.key(at_least_float32(rearrange(keys, "b d h w -> b (h w) d"))),
            rearrange(features, "b d h w -> b (h w) d"),
            _HEADS,
            _WEIGHTS_AT_ONCE,
        )
        return rearrange(dense, "b (h w) d -> b d h w", h=high[0])
