"""Running statistics of batch norms: the same on all ranks, and averaged over steps as weights are.

Each rank norms a micro-batch by its own statistics in training, and moves its running ones towards
them. After a step those of all ranks become the statistics of the ranks' mixture, so that every
rank evaluates and saves the same module, whichever arm it runs. The average over the steps belongs
to the average of the weights. It rises to the decay of the weights, as running statistics start far
from any real ones (0 and 1).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distill.runtime import distributed

FILE = "batch_norms.pt"  # of a checkpoint; only with batch norms and an average


class BatchNorms:
    """The batch norms of a module that an engine trains.

    Args:
        module: with or without batch norms.
        decay: of the average, per step, in [0, 1); 0 for no average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._norms = {
            name: norm
            for name, norm in module.named_modules()
            if isinstance(norm, _NormBase) and norm.running_mean is not None
        }
        self._decay = decay if self._norms else 0.0
        self._kept = self._copies()
        self._average = [each.float() for each in self._copies()] if self._decay else []

    @torch.no_grad()
    def follow(self, steps: int, *, skipped: bool) -> None:
        """Ends an optimiser step, the `steps`-th; every rank calls this.

        The statistics of a step that was skipped are left out, as its values may not be finite.
        """
        if not self._norms:
            return
        current = self._statistics()
        if skipped:
            torch._foreach_copy_(current, self._kept)
            return
        if distributed.world_size() > 1:
            _mix(current)
        torch._foreach_copy_(self._kept, current)
        if self._average:
            decay = min(self._decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(self._average, [each.float() for each in current], 1 - decay)

    def averaged(self) -> dict[str, Tensor]:
        """Name in the module to averaged statistic; empty without an average."""
        kinds = ("running_mean", "running_var")
        names = [f"{name}.{kind}" for name in self._norms for kind in kinds]
        return dict(zip(names, self._average, strict=True)) if self._average else {}

    def write_into(self, module: nn.Module) -> None:
        """Gives a copy of the module the averaged statistics."""
        buffers = dict(module.named_buffers())
        for name, value in self.averaged().items():
            buffers[name].copy_(value)

    def restore(self, stored: Mapping[str, Tensor] | None) -> None:
        """Goes on from the module's own statistics and from what `averaged` returned.

        Args:
            stored: None where a checkpoint has no average: it starts at the module's statistics.
        """
        if not self._norms:
            return
        torch._foreach_copy_(self._kept, self._statistics())
        if self._average:
            values = list(stored.values()) if stored else self._statistics()
            torch._foreach_copy_(self._average, values)

    def _statistics(self) -> list[Tensor]:
        """Those of the module now: the engine may have replaced the tensors."""
        norms: list[Any] = list(self._norms.values())
        return [each for norm in norms for each in (norm.running_mean, norm.running_var)]

    def _copies(self) -> list[Tensor]:
        return [each.detach().clone() for each in self._statistics()]


def _mix(statistics: list[Tensor]) -> None:
    """Replaces means and variances, in turn, by those of the mixture of all ranks."""
    sizes = [each.numel() for each in statistics[::2]]
    means, variances = (torch.cat([s.double() for s in statistics[i::2]]) for i in (0, 1))
    moments = torch.stack([means, variances + means.square()])
    mean, second = distributed.all_reduce(moments) / distributed.world_size()
    variance = (second - mean.square()).clamp(min=0)
    torch._foreach_copy_(statistics[::2], list(mean.split(sizes)))
    torch._foreach_copy_(statistics[1::2], list(variance.split(sizes)))
