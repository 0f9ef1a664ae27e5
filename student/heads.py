"""The MLPs that map the student's tokens to a teacher's features.

"MLP2" of the RADIO family, and C-RADIOv4's attention before it
(../shared/reference/radio-training.md 1.6).
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from student.config import HeadConfig
from student.trunk import init_linear
from teachers.features import Features, FeatureSpec

_LAYER_SCALE = 1e-5  # C-RADIOv4's; a block starts next to the identity


class MLP2(nn.Module):
    """Linear, then residual pre-activation layers, then a last one with a bias that starts at 0.

    Computes in its parameters' dtype and returns float32.

    Args:
        in_dim: channels in.
        out_dim: channels out.
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
        """That of its parameters; a norm's, as reading a linear's may compute it anew."""
        return next(self.final[0].parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_dim) to (..., out_dim) float32."""
        # Heads and losses stay in full precision where the trunk runs under autocast.
        with torch.autocast(x.device.type, enabled=False):
            x = self.fc1(x.to(self.dtype))
            for block in self.blocks:
                x = x + block(x)
            return self.final(x).float()


class Head(nn.Module):
    """What the student says in one teacher's words.

    Args:
        width: channels of the student's tokens.
        target: the teacher's features.
        config: the MLPs' dimensions.
        upsample: how many times denser than the student's grid the map is, along both axes.
    """

    def __init__(self, width: int, target: FeatureSpec, config: HeadConfig, upsample: int) -> None:
        super().__init__()
        self.upsample = upsample
        sizes = {"hidden_dim": config.hidden_dim, "num_layers": config.num_layers}
        self.summary = (
            None if target.summary_dim is None else MLP2(width, target.summary_dim, **sizes)
        )
        self.attention = _attention_blocks(width, config)
        if config.attention_blocks:
            sizes["num_layers"] = 0
        self.spatial = MLP2(width, target.spatial_dim * upsample**2, **sizes)

    def forward(self, class_token: Tensor, patches: Tensor, grid: tuple[int, int]) -> Features:
        """Predicts the teacher's features.

        Args:
            class_token: (B, C) this teacher's own.
            patches: (B, h * w, C).
            grid: (h, w) of the patches.

        Returns:
            Features, float32: summary (B, D_summary) or None, and spatial (B, D, u h, u w).
        """
        summary = None if self.summary is None else self.summary(class_token)
        u = self.upsample
        with torch.autocast(patches.device.type, enabled=False):
            for block in self.attention:
                patches = block(patches.to(self.spatial.dtype))
        spatial = rearrange(
            self.spatial(patches), "b (h w) (y x d) -> b d (h y) (w x)", h=grid[0], y=u, x=u
        )
        return Features(summary, spatial)


def _attention_blocks(width: int, config: HeadConfig) -> nn.ModuleList:
    if not config.attention_blocks:
        return nn.ModuleList()
    from timm.layers import LayerNorm
    from timm.models.vision_transformer import Block

    blocks = nn.ModuleList(
        Block(
            width,
            num_heads=config.attention_heads,
            qkv_bias=True,
            init_values=_LAYER_SCALE,
            norm_layer=LayerNorm,
        )
        for _ in range(config.attention_blocks)
    )
    return blocks.apply(init_linear)
