"""Low-rank updates of frozen weights: LoRA (Hu et al., arXiv 2106.09685)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from teachers.upsamplers.precision import no_autocast


class LowRank(nn.Module):
    """The parametrisation of one weight: W + up down, which starts as W.

    Args:
        weight: (out, in); frozen by the caller.
        rank: of the update.

    Attributes:
        down: (rank, in), random at first.
        up: (out, rank), zero at first.
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


def add_low_rank(module: nn.Module, rank: int) -> None:
    """Freezes the weight of every Linear in `module` and adds an update to it."""
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        linear.weight.requires_grad_(False)
        update = LowRank(linear.weight, rank)
        parametrize.register_parametrization(linear, "weight", update, unsafe=True)


@torch.no_grad()
def updated_weight(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The updated weight from what a state dict holds of its `LowRank`."""
    return weight + state["up"] @ state["down"]
