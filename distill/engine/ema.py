"""The moving average of a module's weights as a module that runs.

`Engine` keeps an average in slices, one a rank, which costs least and cannot run. A loss against
the average needs all of it on every rank, which this holds.
"""

import copy
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class AveragedModule(Generic[M]):
    """A frozen copy of a module, in evaluation mode, that follows its weights.

    Args:
        module: whose weights are followed; it must not be under DeepSpeed yet.
        decay: of the average, a step.

    Attributes:
        module: the copy.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Moves the average towards a module's weights, and takes its buffers over."""
        own, new = tuple(self.module.parameters()), tuple(module.parameters())
        torch._foreach_lerp_(own, new, 1 - self._decay)
        for buffer, value in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, float32 on the CPU."""
        state = self.module.state_dict()
        return {name: value.float().cpu().clone() for name, value in state.items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Goes back to what `weights` returned."""
        self.module.load_state_dict(weights)
