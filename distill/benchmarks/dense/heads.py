"""Heads of dense probes: from an encoder's maps to a prediction of each cell."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from distill.benchmarks.dense.dpt import DPTHead
from teachers.config import StrictConfig


class LinearHeadConfig(StrictConfig):
    """BatchNorm and a 1 x 1 convolution on the encoder's last map."""

    kind: Literal["linear"]


class DPTHeadConfig(StrictConfig):
    """A DPT on four layers; the encoder must return layers, which an upsampled one does not.

    Attributes:
        hidden_dim: channels of the head.
        layers: numbers of the four; None for the last layer of each quarter of the encoder.
    """

    kind: Literal["dpt"]
    hidden_dim: PositiveInt = 256
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=4, max_length=4)] | None = None


HeadConfig = Annotated[LinearHeadConfig | DPTHeadConfig, Field(discriminator="kind")]


class LinearHead(nn.Module):
    """Dropout of channels, BatchNorm and a 1 x 1 convolution.

    Args:
        dim: channels of the map.
        out_dim: channels of the result.
        dropout: probability that a channel is dropped in training.
    """

    def __init__(self, dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(dim)
        self.project = nn.Conv2d(dim, out_dim, 1)
        nn.init.normal_(self.project.weight, std=0.01)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) to (B, out_dim, h, w)."""
        return self.project(self.norm(self.dropout(maps)))


class TaskHeads(nn.Module):
    """One head for each task of a probe.

    Args:
        heads: in the order of the tasks.
    """

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps, each (B, D, h, w), to the predictions of all tasks, (B, sum of outputs, h, w)."""
        return torch.cat([head(*maps) for head in self.heads], dim=1)


def build_head(
    config: LinearHeadConfig | DPTHeadConfig, dims: Sequence[int], out_dim: int
) -> nn.Module:
    """Builds the head of a recipe for maps of `dims` channels."""
    if isinstance(config, DPTHeadConfig):
        return DPTHead(dims, out_dim, config.hidden_dim)
    return LinearHead(dims[0], out_dim)
