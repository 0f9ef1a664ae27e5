"""AdaLoss: each loss is divided by its own running mean, so that none outweighs the others.

Hu et al., "Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing" (AAAI
2019); RADIO v1's published arguments name it. The means are over all ranks, so every rank weighs
alike.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.runtime import distributed

_EPS = 1e-8


class BalancingConfig(BaseModel):
    """How fast the running means follow.

    Attributes:
        decay: of the running mean of a loss, a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(0.99, ge=0, lt=1)


class Balancing:
    """The running means of a run. They move between two steps, so that a step's gradient does not
    depend on how it is cut into passes.

    Args:
        config: how fast they follow.

    Attributes:
        means: name of a loss to its running mean, () float64; empty before the second step.
    """

    def __init__(self, config: BalancingConfig) -> None:
        self._decay = config.decay
        self.means: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def factors(self) -> dict[str, Tensor]:
        """Name to (), what to multiply a loss with; nothing for those not yet followed."""
        return {name: (1 / (mean + _EPS)).float() for name, mean in self.means.items()}

    def add(self, losses: Mapping[str, Tensor], shares: Mapping[str, float]) -> None:
        """Adds the losses of a pass to its step's; every rank has the same names.

        Args:
            losses: name to (), times the pass's share of it.
            shares: name to that share; 0 where the pass says nothing.
        """
        for name, loss in losses.items():
            share = loss.new_tensor(shares[name], dtype=torch.float64)
            both = torch.stack([loss.detach().double(), share])
            self._sums[name] = self._sums.get(name, 0) + both

    def finish_step(self) -> None:
        """Moves the means towards the losses of a step; every rank must call this.

        A loss that was silent on all ranks, or not finite on one, is not followed.
        """
        if not self._sums:
            return
        sums = distributed.all_reduce(torch.stack(list(self._sums.values())))
        for name, (total, share) in zip(self._sums, sums.tolist(), strict=True):
            if share > 0 and math.isfinite(total):
                before = self.means.get(name, sums.new_tensor(total / share))
                self.means[name] = self._decay * before + (1 - self._decay) * total / share
        self._sums = {}


def kept_shares(
    losses: Sequence[Tensor], probability: float, generator: torch.Generator
) -> list[Tensor]:
    """How much each teacher counts for each image.

    Args:
        losses: of each teacher, (B,); without a graph.
        probability: that a teacher other than the worst-matched is dropped.
        generator: on the CPU.

    Returns:
        For each teacher (B,): 0 where it is dropped, else the number of teachers over the number
        of those kept.
    """
    table = torch.stack(list(losses))
    drawn = torch.rand(table.shape, generator=generator).to(table.device)
    kept = drawn >= probability
    kept.scatter_(0, table.argmax(0, keepdim=True), True)
    shares = kept.float() * len(table) / kept.sum(0)
    return list(shares)
