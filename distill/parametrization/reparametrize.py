"""What stands between a student's weights and its layers while it trains, and plain weights after.

Nothing of it is in what is exported: `materialised` puts each effective weight under its plain
name.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from distill.parametrization.lora import updated_weight
from distill.parametrization.spectral import effective_weight, spectral_reparametrise
from distill.parametrization.weight_noise import add_weight_noise
from student.model import Student
from teachers.config import StrictConfig

_MARK = ".parametrizations.weight."


class ReparametrisationConfig(StrictConfig):
    """How a student's linear layers are trained; all off by default.

    Attributes:
        spectral: `trunk` trains the norm of each layer of the blocks as a parameter of its own,
            `all` also those of the heads. Queries, keys and values have one each.
        damp: standard deviation of multiplicative noise on the weights of the trunk.
    """

    spectral: Literal["none", "trunk", "all"] = "none"
    damp: NonNegativeFloat = 0.0


def reparametrise(student: Student, config: ReparametrisationConfig) -> None:
    """Reparametrises a student in place; its outputs in evaluation mode stay as they are."""
    if config.spectral != "none":
        spectral_reparametrise(student.trunk.blocks, kept=True, fused="qkv")
    if config.spectral == "all":
        spectral_reparametrise(student.heads, kept=True, fused="qkv")
    if config.damp:
        add_weight_noise(student.trunk, config.damp)


@torch.no_grad()
def materialised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights under plain names: each effective weight in place of its parametrisation.

    Args:
        weights: the state dict of a module, reparametrised or not, or of one that holds some.
    """
    plain: dict[str, Tensor] = {}
    chains: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in weights.items():
        prefix, found, rest = name.partition(_MARK)
        if found:
            chains[prefix][rest] = value
            name = f"{prefix}.weight"
        if not found or rest == "original":
            plain[name] = value
    for prefix, parts in chains.items():
        first = {n.removeprefix("0."): v for n, v in parts.items() if n.startswith("0.")}
        weight = plain[f"{prefix}.weight"]
        if "up" in first:
            weight = updated_weight(weight, first)
        elif first:
            weight = effective_weight(weight, first)
        plain[f"{prefix}.weight"] = weight
    return plain
