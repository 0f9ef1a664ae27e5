"""AdaLoss: each loss is divided by its own running mean, so that none outweighs the others.

Hu et al., "Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing" (AAAI
2019); RADIO v1's published arguments name it. The means are over all ranks, so every rank weighs
alike.
"""

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill import distributed

_EPS = 1e-8


class BalancingConfig(BaseModel):
    """How fast the running means follow.

    Attributes:
        decay: of the running mean of a loss, a pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(0.99, ge=0, lt=1)


class Balancing:
    """The running means of a run.

    Args:
        config: how fast they follow.

    Attributes:
        means: name of a loss to its running mean, () float64; empty before the first pass.
    """

    def __init__(self, config: BalancingConfig) -> None:
        self._decay = config.decay
        self.means: dict[str, Tensor] = {}

    def __call__(
        self, losses: Mapping[str, Tensor], shares: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Follows the losses of a pass; every rank calls this with the same names.

        Args:
            losses: name to (), times the pass's share of it.
            shares: name to that share; 0 where the pass says nothing. A loss that is silent on all
                ranks, or not finite on one, is not followed.

        Returns:
            Name to (), what to multiply each loss with; without a graph.
        """
        if not losses:
            return {}
        sums = torch.stack([loss.detach().double() for loss in losses.values()])
        counts = sums.new_tensor([shares[name] for name in losses])
        sums, counts = distributed.all_reduce(torch.stack([sums, counts]))
        for name, value in zip(losses, (sums / counts).unbind(), strict=True):
            before = self.means.get(name, torch.full_like(value, torch.nan))
            after = torch.where(
                before.isnan(), value, self._decay * before + (1 - self._decay) * value
            )
            self.means[name] = torch.where(value.isfinite(), after, before)
        factors = {name: 1 / (self.means[name] + _EPS) for name in losses}
        return {name: factor.nan_to_num(1.0).float() for name, factor in factors.items()}
