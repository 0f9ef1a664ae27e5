"""The optimizer, its options, and the groups of parameters that share a rate and a decay."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from distill.runtime import distributed
from teachers.config import StrictConfig

# On a CPU, 16 MB of float32: enough for a collective, and well below the 32 MB from which glibc
# maps fresh memory instead of reusing what the activations have left.
FLAT_SIZE = 4 << 20
_FLAT_SIZE_ON_GPU = 128 << 20  # its allocator reuses any size, and few large collectives are fast


def flat_size(device_type: str | None = None) -> int:
    """The largest number of elements that ZeRO puts into one flat tensor.

    It holds for weights and moments, and for the gradients that are reduced at a time.

    Args:
        device_type: `cpu` or another; None for that of this process.
    """
    on_cpu = (device_type or distributed.device().type) == "cpu"
    return FLAT_SIZE if on_cpu else _FLAT_SIZE_ON_GPU


class OptimizerConfig(StrictConfig):
    """AdamW or NAdam.

    Attributes:
        kind: `adamw` (Loshchilov and Hutter, arXiv 1711.05101) decays weights separately from the
            gradient; `nadam` (Dozat 2016) adds the decay to the gradient, as FeatSharp's training
            does.
        lr: learning rate at the peak of the schedule.
        weight_decay: of matrices; vectors, positions and tokens are not decayed.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
    """

    kind: Literal["adamw", "nadam"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class ParameterGroup(NamedTuple):
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        name: `decay`, `no_decay`, ...; unique within a run.
        parameters: at least one.
        weight_decay: of this group.
        lr_scale: factor on the run's learning rate.
    """

    name: str
    parameters: list[nn.Parameter]
    weight_decay: float
    lr_scale: float = 1.0


def decay_groups(
    module: nn.Module, optimizer: OptimizerConfig, no_decay: set[str]
) -> list[ParameterGroup]:
    """Splits the trainable parameters of a module into those with and without weight decay.

    Args:
        module: whose parameters.
        optimizer: its options; they name the decay.
        no_decay: names of parameters without decay, besides all vectors.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim <= 1 or name in no_decay else decayed).append(parameter)
    groups = [
        ParameterGroup("decay", decayed, optimizer.weight_decay),
        ParameterGroup("no_decay", others, 0.0),
    ]
    return [group for group in groups if group.parameters]


def build_optimizer(
    config: OptimizerConfig, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """Builds the optimizer.

    Its groups are pieces of those given, under the same name, so that a step flattens few gradients
    at a time. The fused form of AdamW is faster, and makes no temporary copies of the flat tensors
    that ZeRO makes of each group.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    rendered = [
        {"name": group.name, "params": piece, "weight_decay": group.weight_decay}
        for group in groups
        for piece in _pieces(group.parameters)
    ]
    if config.kind == "nadam":
        return torch.optim.NAdam(rendered, **options)
    return torch.optim.AdamW(rendered, **options, fused=True)


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters with at most `flat_size` elements in all, or one larger parameter."""
    piece: list[nn.Parameter] = []
    size, most = 0, flat_size()
    for parameter in parameters:
        if piece and size + parameter.numel() > most:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    yield piece
