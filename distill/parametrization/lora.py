"""LoRA: low-rank updates of frozen weights (Hu et al., arXiv 2106.09685)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from teachers.upsamplers.precision import no_autocast


class LoRA(nn.Module):
    """The parametrization of one weight: W + up @ down, which starts as W.

    Args:
        weight: (out, in); the caller freezes it.
        rank: of the update.

    Attributes:
        down: (rank, in), starts random.
        up: (out, rank), starts at zero.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        nn.init.normal_(self.down, std=weight.shape[1] ** -0.5)
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight, (out, in)."""
        with no_autocast(weight):
            return weight + self.up @ self.down


def add_lora(module: nn.Module, rank: int) -> None:
    """Freezes the weight of every Linear in `module` and adds a trainable update to it."""
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        linear.weight.requires_grad_(False)
        update = LoRA(linear.weight, rank)
        parametrize.register_parametrization(linear, "weight", update, unsafe=True)


@torch.no_grad()
def merge_lora(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The updated weight.

    Args:
        weight: (out, in), frozen.
        state: the state dict of its `LoRA`.
    """
    return weight + state["up"] @ state["down"]
