"""The exponential moving average of a module's weights, as a module that runs.

The engine usually keeps the average in slices, one a rank: that costs least memory, but it cannot
run. A loss against the output of the average (MESA) needs all of it on every rank, as here.
"""

import copy
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class AveragedModule(Generic[M]):
    """A frozen copy (`module`) of a module, in evaluation mode, with the average of its weights.

    DeepSpeed must not have split the module yet. The decay, in [0, 1), is per step.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Moves the average by one step towards a module's weights, and copies its buffers."""
        own, new = tuple(self.module.parameters()), tuple(module.parameters())
        torch._foreach_lerp_(own, new, 1 - self._decay)
        for buffer, value in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, in float32 (counts as they are) on the CPU."""
        return {
            name: (value.float() if value.is_floating_point() else value).cpu().clone()
            for name, value in self.module.state_dict().items()
        }

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Restores what `weights` returned."""
        self.module.load_state_dict(weights)
