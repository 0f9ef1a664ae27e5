"""Weights of losses that follow their values: AdaLoss, and dropping of well-matched teachers.

AdaLoss divides each loss by its own running mean, so that none outweighs the others: Hu et al.,
"Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing" (AAAI 2019); RADIO
v1's published arguments name it. The means are over all ranks, so that weights are the same.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from distill.runtime import distributed
from teachers.config import StrictConfig

_EPS = 1e-8


class BalancingConfig(StrictConfig):
    """The running means of the losses, with their decay in each step."""

    decay: float = Field(0.99, ge=0, lt=1)


class Balancing:
    """The running means of the losses of a run.

    They change between two steps only, so that a step's gradient does not depend on its division
    into micro-batches.

    Attributes:
        means: loss name to running mean, () float64; empty before the second step.
    """

    def __init__(self, config: BalancingConfig) -> None:
        self._decay = config.decay
        self.means: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def factors(self) -> dict[str, Tensor]:
        """Loss name to the factor () of the loss; losses that have no mean yet are absent."""
        return {name: (1 / (mean + _EPS)).float() for name, mean in self.means.items()}

    def add(self, losses: Mapping[str, Tensor], shares: Mapping[str, float]) -> None:
        """Adds the losses of a micro-batch to those of its step; names are the same on every rank.

        Args:
            losses: loss name to value (), times the micro-batch's share of that loss.
            shares: loss name to that share; 0 for a loss that the micro-batch does not have.
        """
        for name, loss in losses.items():
            share = loss.new_tensor(shares[name], dtype=torch.float64)
            both = torch.stack([loss.detach().double(), share])
            self._sums[name] = self._sums.get(name, 0) + both

    def finish_step(self) -> None:
        """Moves the means towards the losses of a step; every rank must call this.

        The mean of a loss does not move if no rank had the loss, or if it was not finite.
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
    """Drops teachers at random for each image, but never the one with the largest loss.

    Args:
        losses: of each teacher, (B,); without a graph.
        probability: of any other teacher to be dropped.
        generator: on the CPU.

    Returns:
        The weight of each teacher for each image, (B,): 0 if it is dropped, else the number of
        teachers over the number of those kept.
    """
    table = torch.stack(list(losses))
    drawn = torch.rand(table.shape, generator=generator).to(table.device)
    kept = drawn >= probability
    kept.scatter_(0, table.argmax(0, keepdim=True), True)
    shares = kept.float() * len(table) / kept.sum(0)
    return list(shares)
