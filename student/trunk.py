"""The student's backbone: a pre-norm ViT made of timm's blocks.

It ends with a LayerNorm unless the configuration says otherwise, as timm's ViTs do and as the RADIO
family's do with `model_norm` on: backbone features then have a scale that does not grow with depth,
and weights of a timm ViT keep their meaning.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from student.config import StudentConfig
from student.embedding import Embedding


class Trunk(nn.Module):
    """Images to tokens: class tokens, registers, patches in row-major order.

    Args:
        config: the student's.
        num_class_tokens: one for each teacher.
    """

    def __init__(self, config: StudentConfig, num_class_tokens: int) -> None:
        # Two seconds that --help, a mistake in a recipe and an export do without.
        from timm.layers import LayerNorm
        from timm.models.vision_transformer import Block

        super().__init__()
        width, depth, heads, mlp_dim = config.shape
        num_registers = config.count_registers(num_class_tokens)
        self.num_skip = num_class_tokens + num_registers
        self.activation_checkpointing = config.activation_checkpointing
        self.embedding = Embedding(
            width,
            patch_size=config.patch_size,
            table_side=config.table_side,
            num_class_tokens=num_class_tokens,
            num_registers=num_registers,
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads=heads,
                # timm truncates the product; half a channel keeps it off the edge.
                mlp_ratio=(mlp_dim + 0.5) / width,
                qkv_bias=True,
                init_values=config.layer_scale,
                norm_layer=LayerNorm,
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(width) if config.final_norm else nn.Identity()
        self.apply(_init_linear)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes (B, 3, H, W), normalised, into (B, num_skip + h * w, C)."""
        return self.intermediates(images, [len(self.blocks) - 1])[0]

    def intermediates(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The tokens after some blocks, numbered from 0, each after the norm as the last are."""
        x = self.embedding(images)
        chosen = []
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                # Blocks draw no random numbers, so there is no state to keep for the second pass.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
            if number in indices:
                chosen.append(self.norm(x))
        return chosen


def _init_linear(module: nn.Module) -> None:
    """timm's ViT initialisation."""
    from timm.layers import trunc_normal_

    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
