"""ReSFU: refreshed similarity-based feature upsampling (arXiv 2407.02283).

Written from the three ideas of the paper, not from its code:

1. Queries and keys are aligned before they are compared. Keys are embedded features. Queries are
   details of the image mapped to the space of the keys by a guided filter (He et al., 2013): around
   each cell the keys are fitted as a linear function of the guidance, whose coefficients are found
   on the low grid and applied to the guidance on the high grid. The filter's regulariser controls
   how much detail passes.
2. Similarity is learned from paired central differences: a 3 x 3 convolution of (neighbouring key
   - own query), a non-linearity, and one logit for each of the 3 x 3 neighbours.
3. Neighbours are fine-grained: they are centred on the output cell itself, not on its
   low-resolution cell, which avoids blocks. They lie one low-resolution cell apart in the
   interpolated map. Any factor is one step.

Not from the paper: the widths, a regulariser learned for each channel, the spatial kernel as a bias
of the logits (initially a Gaussian of one cell), and the computation. Interpolation commutes with
shifts of whole cells, so the convolution of the keys runs on the low grid, and the 3 x 3 weights
fold into 4 x 4 weights on the low-resolution features.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from teachers.features import FeatureSpec
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.local_gather import local_gather
from teachers.upsamplers.precision import at_least_float32
from teachers.upsamplers.resize import enlarge, scaled
from teachers.upsamplers.upsampler import FactorConfig, SinglePassUpsampler

_EMBEDDING_DIM = 64
_HIDDEN_DIM = 128
_OFFSETS = (-1, 0, 1)  # low-resolution cells, per axis


def neighbour_taps(cells: int, factor: int) -> tuple[Tensor, Tensor]:
    """Interpolation weights of the three neighbours of each output cell, along one axis.

    Args:
        cells: number of low-resolution cells.
        factor: output cells for each of them.

    Returns:
        The first of the low-resolution cells that an output cell's neighbours are interpolated
        from, (H,) int64, and the weights of up to four cells from there, (H, 3, min(4, cells))
        float64. Beyond the ends the border cell is repeated.
    """
    taps = min(4, cells)
    place = (torch.arange(factor * cells, dtype=torch.float64) + 0.5) / factor - 0.5
    place = place.clamp(0, cells - 1)
    first = (place.floor().long() - 1).clamp(0, cells - taps)
    neighbour = place[:, None] + torch.tensor(_OFFSETS, dtype=torch.float64)
    cell = first[:, None] + torch.arange(taps)
    distance = (neighbour.clamp(0, cells - 1)[:, :, None] - cell[:, None]).abs()
    return first, (1 - distance).clamp(min=0)


class GuidedFilter(nn.Module):
    """A fast guided filter over 3 x 3 cells, with one channel of guidance for each of the keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_epsilon = nn.Parameter(torch.full((dim, 1, 1), -4.0))  # exp(-4) = 0.02

    def forward(self, guide: Tensor, keys: Tensor, factor: tuple[int, int]) -> Tensor:
        """Upsamples keys (B, D, h, w) with the detail of a guide (B, D, fh * h, fw * w)."""
        coarse = F.avg_pool2d(guide, factor)
        mean_guide, mean_keys = _box(coarse), _box(keys)
        covariance = _box(coarse * keys) - mean_guide * mean_keys
        variance = (_box(coarse * coarse) - mean_guide * mean_guide).clamp(min=0)
        slope = covariance / (variance + self.log_epsilon.exp())
        return enlarge(slope, factor) * guide + enlarge(mean_keys - slope * mean_guide, factor)


def _box(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)


class ReSFUConfig(FactorConfig):
    """ReSFU."""

    kind: str = "resfu"


class ReSFU(SinglePassUpsampler):
    """Softmax of learned central differences, over 3 x 3 interpolated features."""

    Config = ReSFUConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int]) -> None:
        super().__init__(spec, factor)
        # No biases here: the guided filter and the differences would cancel them.
        self.key = nn.Linear(spec.spatial_dim, _EMBEDDING_DIM, bias=False)
        self.detail = nn.Sequential(
            nn.Conv2d(3, _EMBEDDING_DIM, 3, padding=1, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv2d(_EMBEDDING_DIM, _EMBEDDING_DIM, 1, bias=False),
        )
        self.align = GuidedFilter(_EMBEDDING_DIM)
        self.difference = nn.Conv2d(
            _EMBEDDING_DIM, _HIDDEN_DIM, 3, padding=1, padding_mode="replicate"
        )
        self.logits = nn.Conv2d(_HIDDEN_DIM, len(_OFFSETS) ** 2, 1)
        with torch.no_grad():
            y, x = torch.meshgrid(torch.tensor(_OFFSETS), torch.tensor(_OFFSETS), indexing="ij")
            self.logits.bias.copy_((-(y * y + x * x) / 2).flatten())  # type: ignore[union-attr]

    def weights(self, features: Tensor, images: Tensor) -> Tensor:
        """Weights (B, fh * h, fw * w, 3, 3) of each cell's neighbours, positive, with sum one.

        Args:
            features: (B, D, h, w).
            images: (B, 3, H, W) in [0, 1].
        """
        size = scaled((features.shape[-2], features.shape[-1]), self.factor)
        tokens = at_least_float32(rearrange(features, "b d h w -> b h w d"))
        keys = rearrange(self.key(F.layer_norm(tokens, tokens.shape[-1:])), "b h w d -> b d h w")
        detail = self.detail(guidance(images, size))
        # Variances as differences of means need float32.
        queries = self.align(at_least_float32(detail), at_least_float32(keys), self.factor)
        own = F.conv2d(queries, self.difference.weight.sum((2, 3), keepdim=True))
        hidden = F.silu(enlarge(self.difference(keys), self.factor) - own)
        logits = rearrange(self.logits(hidden), "b k h w -> b h w k")
        weights = at_least_float32(logits).softmax(-1)
        return rearrange(weights, "b h w (i j) -> b h w i j", i=len(_OFFSETS))

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples; see `SinglePassUpsampler.dense`."""
        weights = self.weights(features, images)
        rows, row_taps = neighbour_taps(features.shape[-2], self.factor[0])
        columns, column_taps = neighbour_taps(features.shape[-1], self.factor[1])
        row_taps, column_taps = row_taps.to(weights), column_taps.to(weights)
        folded = torch.einsum("yil,byxij->byxlj", row_taps, weights)
        folded = torch.einsum("xjm,byxlj->byxlm", column_taps, folded)
        return local_gather(features, folded.contiguous(), rows, columns)
