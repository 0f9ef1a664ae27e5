"""Which optimiser moves which parameters, and how fast."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from distill.runtime import distributed
from teachers.config import StrictConfig

# On a CPU in float32 16 MB: enough for a collective, and well below the 32 MB from which glibc maps
# fresh memory instead of using again what the activations have left.
FLAT_SIZE = 4 << 20
_FLAT_SIZE_ON_GPU = 128 << 20  # its allocator keeps what it has, and few large collectives are fast


def flat_size(device_type: str | None = None) -> int:
    """Elements that ZeRO makes one flat tensor of, at most.

    Weights, moments and gradients are held so, and gradients are reduced so many at a time.

    Args:
        device_type: `cpu` or another; None for that of this process.
    """
    on_cpu = (device_type or distributed.device().type) == "cpu"
    return FLAT_SIZE if on_cpu else _FLAT_SIZE_ON_GPU


class OptimizerConfig(StrictConfig):
    """AdamW or NAdam; the learning rate is the peak of the schedule.

    Attributes:
        kind: `adamw` decays weights apart from the gradient; `nadam` (Dozat 2016) adds the decay
            to the gradient, as FeatSharp's training does.
        lr: peak learning rate.
        weight_decay: for matrices; vectors, positions and tokens are not decayed.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
    """

    kind: Literal["adamw", "nadam"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class ParameterGroup(NamedTuple):
    """Parameters that share a learning rate and a decay.

    Attributes:
        name: `decay`, `no_decay`, ...; unique within a run.
        parameters: at least one.
        weight_decay: of this group.
        lr_scale: times the run's learning rate.
    """

    name: str
    parameters: list[nn.Parameter]
    weight_decay: float
    lr_scale: float = 1.0


def decay_groups(
    module: nn.Module, optimizer: OptimizerConfig, no_decay: set[str]
) -> list[ParameterGroup]:
    """Splits trainable parameters in those that weight decay shrinks and those that it leaves.

    Args:
        module: whose parameters.
        optimizer: gives the decay.
        no_decay: names that are not decayed although they are matrices.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name in no_decay else decayed).append(parameter)
    groups = [
        ParameterGroup("decay", decayed, optimizer.weight_decay),
        ParameterGroup("no_decay", free, 0.0),
    ]
    return [group for group in groups if group.parameters]


def build_optimizer(
    config: OptimizerConfig, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """Builds the optimiser.

    AdamW's fused form is the faster one, and keeps no temporary copies of the flat tensors that
    ZeRO makes of each of its groups. Those are parts of the groups given, with the same name, so
    that a step flattens few gradients at a time.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    rendered = [
        {"name": group.name, "params": part, "weight_decay": group.weight_decay}
        for group in groups
        for part in _parts(group.parameters)
    ]
    if config.kind == "nadam":
        return torch.optim.NAdam(rendered, **options)
    return torch.optim.AdamW(rendered, **options, fused=True)


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of at most `flat_size` elements together, or a single larger one."""
    part: list[nn.Parameter] = []
    size, most = 0, flat_size()
    for parameter in parameters:
        if part and size + parameter.numel() > most:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.numel()
    yield part
