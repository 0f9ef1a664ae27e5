"""The interface between what is trained and the library that trains it."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distill.engine.engine_config import EngineConfig


class StepResult(NamedTuple):
    """What one optimizer step reports.

    Attributes:
        grad_norm: norm of the gradient before clipping; infinite if the gradient was not finite.
        skipped: whether the weights were left as they were because the gradient was not finite.
        loss_scale: the loss scale of fp16; 1 in other precisions.
    """

    grad_norm: float
    skipped: bool
    loss_scale: float


class Engine(Protocol):
    """A module that is trained on all ranks, its optimizer, and the average of its weights.

    Tasks call its forward pass and read its weights; the loop drives the rest.

    Attributes:
        config: precision, sharding, clipping and averaging.
    """

    config: EngineConfig

    @property
    def steps(self) -> int:
        """Number of optimizer steps done, skipped ones included; a checkpoint restores it."""
        ...

    @property
    def averaged(self) -> nn.Module | None:
        """The frozen average in evaluation mode; None unless each rank keeps all of it."""
        ...

    def __call__(self, *inputs: Any) -> Any:
        """Runs the module's forward pass."""

    def train(self, mode: bool = True) -> None:
        """Switches the module between training and evaluation mode."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, already weighted by the caller, to that of this step."""

    def step(self, lr: float) -> StepResult:
        """Clips the gradient, updates the weights and their average, and clears the gradient.

        Args:
            lr: learning rate of this step, before the `lr_scale` of each parameter group.
        """
        ...

    def weights(self, *, average: bool = True) -> dict[str, Tensor]:
        """Gathers the module's float32 weights, under its own names, on the CPU of every rank.

        Every rank must call this.

        Args:
            average: whether to return the moving average, if there is one, instead of the
                current weights.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the weights, their average and the optimizer state; every rank must call this.

        Raises:
            AnyRankFailed: on every rank, if one could not write.
        """

    def load(self, folder: Path, *, ranks: int) -> None:
        """Restores what `save` wrote, except for the options that the recipe sets.

        Args:
            folder: of a checkpoint.
            ranks: number of ranks that wrote it; it may differ from the number of ranks now.
        """

    def close(self) -> None:
        """Frees hooks and buffers."""


class Autocast(nn.Module):
    """Calls a module on a tensor, under bfloat16 autocast if the precision is bf16."""

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self.module = module
        self.enabled = precision == "bf16"

    def forward(self, *inputs: Any) -> Any:
        """Calls the module."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.enabled):
            return self.module(*inputs)
