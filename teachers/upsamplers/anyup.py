"""AnyUp (arXiv 2510.12764): JAFAR within windows, with weights that do not depend on the encoder.

The features enter the keys only through a signature of fixed size: each channel is convolved with
the same bank of filters, a softmax over the bank tells which filters the channel resembles at a
cell, and the mean over channels is the signature. Each output cell then attends to the
low-resolution cells in a window around it. The weights of the heads are averaged and applied to the
raw features.

Unlike in the paper, the window is given in cells, not as a fraction of the image, and the border is
repeated for the filters. It is trained for one encoder, like all upsamplers here, although its
parameters fit any.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teachers.features import FeatureSpec
from teachers.upsamplers.guidance_encoder import DIM, GuidanceEncoder, conv3x3, projection
from teachers.upsamplers.precision import at_least_float32
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.upsampler import FactorConfig, SinglePassUpsampler
from teachers.upsamplers.window import window_upsample

_HEADS = 4
_SIDE = 5  # cells along each side of the filters
_RESPONSES_AT_ONCE = 2**21  # for one image; bounds memory to 8 MB in float32


class ChannelSignature(nn.Module):
    """Mean over channels of the softmax responses to a shared bank of filters."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Linear(_SIDE * _SIDE, DIM, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, D, h, w), of any D, to (B, DIM, h, w), positive and with sum one."""
        b, d, h, w = features.shape
        maps = F.normalize(at_least_float32(features), dim=1)
        padded = F.pad(maps, (_SIDE // 2,) * 4, mode="replicate")
        channels = max(1, _RESPONSES_AT_ONCE // (DIM * h * w))
        total = torch.zeros(b, h, w, DIM, dtype=maps.dtype, device=maps.device)
        for part in padded.split(channels, dim=1):
            total = total + checkpoint(
                self.responses, part, use_reentrant=False, preserve_rng_state=False
            )
        return rearrange(total / d, "b h w m -> b m h w")

    def responses(self, padded: Tensor) -> Tensor:
        """Sum of the softmax over filters over the given channels, (B, h, w, DIM)."""
        patches = padded.unfold(2, _SIDE, 1).unfold(3, _SIDE, 1)
        flat = rearrange(patches, "b d h w i j -> b d h w (i j)")
        return at_least_float32(self.bank(flat)).softmax(-1).sum(1)


class AnyUpConfig(FactorConfig):
    """AnyUp.

    Attributes:
        radius: low-resolution cells that an output cell attends to on either side. The paper's
            tenth of the image is 2.7 cells of a 27 x 27 map.
    """

    kind: str = "anyup"
    radius: PositiveInt = 3


class AnyUp(SinglePassUpsampler):
    """Windowed attention from the image to features of any encoder.

    Args:
        spec: what the encoder returns and accepts.
        factor: (fh, fw), how many times denser the output grid is, per axis.
        radius: low-resolution cells that an output cell attends to on either side.
    """

    Config = AnyUpConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int], radius: int = 3) -> None:
        super().__init__(spec, factor)
        self.radius = radius
        self.guide = GuidanceEncoder()
        self.signature = ChannelSignature()
        self.fuse = conv3x3(2 * DIM, DIM)
        self.query, self.key = projection(), projection()

    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples; see `SinglePassUpsampler.dense`."""
        h, w = features.shape[-2:]
        queries, keys = self.guide(images, (h, w), scaled((h, w), self.factor))
        keys = self.fuse(torch.cat([keys, self.signature(features)], dim=1))
        q, k = (
            rearrange(
                project(at_least_float32(rearrange(maps, "b d h w -> b h w d"))),
                "b h w d -> b d h w",
            )
            for project, maps in ((self.query, queries), (self.key, keys))
        )
        scale = (DIM // _HEADS) ** -0.5
        return window_upsample(features, q, k, radius=self.radius, heads=_HEADS, scale=scale)
