"""Reparametrizes a student for training, and turns its state dict into plain weights again.

Files that are exported hold plain weights only.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from distill.parametrization.lora import merge_lora
from distill.parametrization.spectral import effective_weight, spectral_reparametrize
from distill.parametrization.weight_noise import add_weight_noise
from student.model import Student
from student.trunk import Trunk
from teachers.config import StrictConfig

_MARK = ".parametrizations.weight."


class ReparametrizationConfig(StrictConfig):
    """How the linear layers of a student are reparametrized; not at all by default.

    Attributes:
        spectral: `trunk` trains the spectral norm of each linear layer of the blocks as a
            parameter of its own, `all` also those of the heads. Queries, keys and values have one
            each.
        damp: standard deviation of the multiplicative noise on the weights of the trunk; 0 adds
            none.
    """

    spectral: Literal["none", "trunk", "all"] = "none"
    damp: NonNegativeFloat = 0.0


def reparametrize(student: Student, config: ReparametrizationConfig) -> None:
    """Reparametrizes a ViT in place, without changing its outputs in evaluation mode."""
    if config.spectral == "none" and not config.damp:
        return
    assert isinstance(student.trunk, Trunk)  # a recipe refuses others
    if config.spectral != "none":
        spectral_reparametrize(student.trunk.blocks, keep_norm=True, fused="qkv")
    if config.spectral == "all":
        spectral_reparametrize(student.heads, keep_norm=True, fused="qkv")
    if config.damp:
        add_weight_noise(student.trunk, config.damp)


@torch.no_grad()
def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces each parametrization by the effective weight, under its plain name.

    Args:
        state: the state dict of a module, of which any part may be reparametrized.
    """
    plain: dict[str, Tensor] = {}
    chains: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in state.items():
        prefix, found, rest = name.partition(_MARK)
        if found:
            chains[prefix][rest] = value
            name = f"{prefix}.weight"
        if not found or rest == "original":
            plain[name] = value
    for prefix, chain in chains.items():
        first = {n.removeprefix("0."): v for n, v in chain.items() if n.startswith("0.")}
        weight = plain[f"{prefix}.weight"]
        if "up" in first:
            weight = merge_lora(weight, first)
        elif first:
            weight = effective_weight(weight, first)
        plain[f"{prefix}.weight"] = weight
    return plain
