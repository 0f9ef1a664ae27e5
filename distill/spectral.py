"""Spectral reparametrisation: each Linear's largest singular value is a parameter of its own.

The effective weight is W (softplus(s) + 0.05) / sigma(W) (Zhai et al., arXiv 2303.06296, in the
form that FeatSharp and RADIO train with). s starts where the norm is 1, which rescales the initial
weights. It is a technique of training only: `materialised` gives plain weights behind.

One step of power iteration in each forward pass of training keeps sigma up to date, so a module
under activation checkpointing, which runs forward twice, must not use it.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from teachers.upsamplers.precision import no_autocast

_FLOOR = 0.05
_EPS = 1e-6
_FIRST_ITERATIONS = 15


class SpectralScale(nn.Module):
    """The parametrisation of one weight.

    Attributes:
        scale: (1,) s; weight decay on it pulls the norm towards log(2) + 0.05.
        u: (out,) left singular vector, a buffer.
        v: (in,) right singular vector, a buffer.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # softplus(scale) + floor = 1
        start = math.log(math.expm1(1 - _FLOOR))
        self.scale = nn.Parameter(weight.new_full((1,), start))  # DeepSpeed takes no ()
        # From a generator of its own: what is built afterwards draws the same numbers without it.
        u = torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
        self.register_buffer("u", F.normalize(u, dim=0).to(weight))
        self.register_buffer("v", weight.new_zeros(weight.shape[1]))
        self._iterate(weight.detach(), _FIRST_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, (out, in)."""
        with no_autocast(weight):
            if self.training and torch.is_grad_enabled():
                self._iterate(weight.detach(), 1)
            # Copies: the next forward pass writes into the buffers before this one's backward.
            return _effective(weight, self.scale, self.u.clone(), self.v.clone())

    @torch.no_grad()
    def _iterate(self, weight: Tensor, steps: int) -> None:
        for _ in range(steps):
            self.v.copy_(F.normalize(torch.mv(weight.T, self.u), dim=0, eps=_EPS))
            self.u.copy_(F.normalize(torch.mv(weight, self.v), dim=0, eps=_EPS))


def _effective(weight: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> Tensor:
    sigma = torch.dot(u, torch.mv(weight, v))
    return weight * ((F.softplus(scale) + _FLOOR) / sigma.clamp(min=_EPS))


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _reparametrised(linear: nn.Linear) -> bool:
    if not parametrize.is_parametrized(linear, "weight"):
        return False
    chains = cast(nn.ModuleDict, linear.parametrizations)
    return any(isinstance(p, SpectralScale) for p in chains["weight"].children())


def spectral_reparametrise(module: nn.Module) -> None:
    """Reparametrises the weight of every Linear in `module`, in place.

    Weights `NAME.weight` become `NAME.parametrizations.weight.original`; the scales are
    `NAME.parametrizations.weight.0.scale`.

    Raises:
        RuntimeError: done already.
    """
    linears = _linears(module)
    if any(map(_reparametrised, linears)):
        raise RuntimeError("spectral_reparametrise: the module is reparametrised already")
    for linear in linears:
        # unsafe: skips a trial run; the shape and the type stay by construction
        parametrize.register_parametrization(
            linear, "weight", SpectralScale(linear.weight), unsafe=True
        )


@torch.no_grad()
def materialised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights under plain names: each effective weight in place of its reparametrisation.

    Args:
        weights: the state dict of a module, reparametrised or not, or of one that holds some.
    """
    plain: dict[str, Tensor] = {}
    for name, value in weights.items():
        prefix, found, rest = name.partition(".parametrizations.weight.")
        if not found:
            plain[name] = value
        elif rest == "original":
            scale, u, v = (weights[f"{prefix}{found}0.{part}"] for part in ("scale", "u", "v"))
            plain[f"{prefix}.weight"] = _effective(value, scale, u, v)
    return plain
