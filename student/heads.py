"""Projection heads, from the student's tokens to the features of a teacher.

The "MLP2" heads of the RADIO family (RADIOv2.5, arXiv 2412.07679), optionally with the attention
blocks of C-RADIOv4 (arXiv 2601.17237) before the MLP of the map.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from student.config import HeadConfig
from student.trunk import init_linear
from teachers.features import Features, FeatureSpec

_LAYER_SCALE = 1e-5  # C-RADIOv4's: a new block is close to the identity


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A block without autocast; where there is none, a block without effect.

    A program of torch.export could not be saved with a block of autocast.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class MLP2(nn.Module):
    """Linear, then residual pre-activation layers, then a linear whose bias starts at zero.

    Computes in its parameters' dtype and returns float32.

    Args:
        in_dim: input channels.
        out_dim: output channels.
        hidden_dim: channels between.
        num_layers: residual layers.
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim))
            for _ in range(num_layers)
        )
        last = nn.Linear(hidden_dim, out_dim)
        nn.init.zeros_(last.bias)
        self.final = nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU(), last)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        # Of a norm: the weight of a linear may be parametrized and computed at every read.
        return next(self.final[0].parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_dim) to (..., out_dim) float32."""
        # Under autocast only the trunk runs in half precision; heads and losses do not.
        with without_autocast(x.device.type):
            x = self.fc1(x.to(self.dtype))
            for block in self.blocks:
                x = x + block(x)
            return self.final(x).float()


class Head(nn.Module):
    """Summary and spatial projection heads of one teacher.

    Args:
        width: channels of the student's tokens.
        target: the spec of the teacher's features.
        config: the dimensions of the MLPs.
        upsample: how many times denser than the student's grid the map is, along both axes.
        summary_width: channels of what the summary head reads; None for those of the tokens.
    """

    def __init__(
        self,
        width: int,
        target: FeatureSpec,
        config: HeadConfig,
        upsample: int,
        summary_width: int | None = None,
    ) -> None:
        super().__init__()
        self.upsample = upsample
        sizes = {"hidden_dim": config.hidden_dim, "num_layers": config.num_layers}
        read = summary_width or width
        self.summary = (
            None if target.summary_dim is None else MLP2(read, target.summary_dim, **sizes)
        )
        self.attention = attention_blocks(width, config)
        if config.attention_blocks:
            sizes["num_layers"] = 0
        self.spatial = MLP2(width, target.spatial_dim * upsample**2, **sizes)

    def forward(self, class_token: Tensor, patches: Tensor, grid: tuple[int, int]) -> Features:
        """Predicts the teacher's features.

        Args:
            class_token: (B, C) of this teacher, or the vector that stands for it.
            patches: (B, h * w, C).
            grid: (h, w) of the patches.

        Returns:
            Features, float32: summary (B, D_summary) or None, and spatial (B, D, u h, u w).
        """
        summary = None if self.summary is None else self.summary(class_token)
        u = self.upsample
        with without_autocast(patches.device.type):
            for block in self.attention:
                patches = block(patches.to(self.spatial.dtype))
        spatial = rearrange(
            self.spatial(patches), "b (h w) (y x d) -> b d (h y) (w x)", h=grid[0], y=u, x=u
        )
        return Features(summary, spatial)


def attention_blocks(width: int, config: HeadConfig) -> nn.ModuleList:
    """The blocks before the MLP of a map; an empty list if the config has none."""
    if not config.attention_blocks:
        return nn.ModuleList()
    from timm.layers import LayerNorm
    from timm.models.vision_transformer import Block

    blocks = nn.ModuleList(
        Block(
            width,
            num_heads=config.attention_heads,
            qkv_bias=config.attention_bias,
            init_values=_LAYER_SCALE,
            norm_layer=LayerNorm,
        )
        for _ in range(config.attention_blocks)
    )
    return blocks.apply(init_linear)
