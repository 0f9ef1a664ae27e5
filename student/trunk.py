"""The student's backbone: a pre-norm ViT made of timm's blocks.

No LayerNorm follows the last block, as in the public models of the RADIO family, so that what reads
them reads a student. With `final_norm` one does, as in timm's ViTs and in RADIO models with
`model_norm`: the weights of a timm ViT then give timm's features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from student.config import StudentConfig
from student.embedding import Embedding
from student.windows import Windows, global_blocks, window_order


class Trunk(nn.Module):
    """Encodes images into class tokens, registers and patch tokens, these in row-major order.

    Args:
        config: the student's configuration.
        num_class_tokens: one for each teacher.
        isolated: indices of the class tokens that no other token attends to.
    """

    def __init__(
        self, config: StudentConfig, num_class_tokens: int, isolated: Sequence[int] = ()
    ) -> None:
        # Imported here because it takes two seconds, which --help and exports do not need.
        from timm.layers import LayerNorm
        from timm.models.vision_transformer import Block

        super().__init__()
        width, depth, heads, mlp_dim = config.shape
        num_registers = config.count_registers(num_class_tokens)
        self.num_skip = num_class_tokens + num_registers
        self.activation_checkpointing = config.activation_checkpointing
        self._windows, self._isolated = config.windows, list(isolated)
        self.embedding = Embedding(
            width,
            patch_size=config.patch_size,
            table_side=config.table_side,
            num_class_tokens=num_class_tokens,
            num_registers=num_registers,
            position_dropout=config.position_dropout,
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads=heads,
                # timm truncates width * mlp_ratio; half a channel more makes rounding harmless.
                mlp_ratio=(mlp_dim + 0.5) / width,
                qkv_bias=True,
                init_values=config.layer_scale,
                norm_layer=LayerNorm,
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(width) if config.final_norm else nn.Identity()
        self.apply(init_linear)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def map_index(self) -> int:
        """Number of the block whose tokens are the student's: the last."""
        return len(self.blocks) - 1

    def forward(self, images: Tensor, window: int | None = None) -> Tensor:
        """Encodes (B, 3, H, W), normalised, into (B, num_skip + h * w, C)."""
        return self.intermediates(images, [len(self.blocks) - 1], window)[0]

    def intermediates(
        self, images: Tensor, indices: Sequence[int], window: int | None = None
    ) -> list[Tensor]:
        """The tokens after some blocks, all after the final norm if there is one.

        Args:
            images: (B, 3, H, W), normalised.
            indices: of the blocks, from 0.
            window: side in patches of the windows that most blocks attend within; None for
                global attention in all blocks.

        Returns:
            (B, num_skip + h * w, C) for each of the blocks.
        """
        x = self.embedding(images)
        if window is None:
            return self._run(x, indices)
        p = self.embedding.patch_size
        order = window_order((images.shape[2] // p, images.shape[3] // p), window).to(x.device)
        prefix = torch.arange(self.num_skip, device=x.device)
        order = torch.cat([prefix, order + self.num_skip])
        found = self._run(x[:, order], indices, window**2)
        back = order.argsort()
        return [tokens[:, back] for tokens in found]

    def _run(self, x: Tensor, indices: Sequence[int], count: int | None = None) -> list[Tensor]:
        """Tokens after some blocks; most blocks attend within windows of `count` patches."""
        # x.shape[0], not len(x), which torch.export would treat as a constant.
        config, depth, batch = self._windows, len(self.blocks), x.shape[0]
        everywhere = set(range(depth)) if count is None else global_blocks(depth, config.num_global)
        windows = Windows(self.num_skip, count or 0, config.prefix)
        chosen, split, mask = [], False, self._mask(x, split=False)
        for number, block in enumerate(self.blocks):
            if split == (number in everywhere):
                x = windows.join(x, batch) if split else windows.split(x)
                split = not split
                mask = self._mask(x, split=split)
            x = self._block(block, x, mask)
            if number in indices:
                chosen.append(self.norm(windows.join(x, batch) if split else x))
        return chosen

    def _block(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.activation_checkpointing and self.training:
            # Blocks draw no random numbers, so no generator state is kept for the second pass.
            return checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=False)
        return block(x, mask)

    def _mask(self, x: Tensor, *, split: bool) -> Tensor | None:
        """Boolean attention mask (queries, keys); None where all tokens attend to all."""
        if not self._isolated or (split and self._windows.prefix == "drop"):
            return None
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        mask[:, self._isolated] = False
        mask[self._isolated, self._isolated] = True
        return mask


def init_linear(module: nn.Module) -> None:
    """Initialises a linear layer as timm's ViTs do; leaves other modules as they are."""
    from timm.layers import trunc_normal_

    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
