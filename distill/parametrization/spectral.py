"""Spectral reparametrisation: each Linear's largest singular value is a parameter of its own.

The effective weight is W (softplus(s) + 0.05) / sigma(W) (Zhai et al., arXiv 2303.06296, in the
form that FeatSharp and RADIO train with). s starts where the norm is 1, which rescales the initial
weights, or where it is the weight's own, which does not. It is a technique of training only:
`reparametrisation.materialised` gives plain weights behind.

One step of power iteration in each forward pass of training keeps sigma up to date, so a module
under activation checkpointing, which runs forward twice, must not use it.
"""

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

    Args:
        weight: (out, in).
        kept: whether the norm starts as the weight's own, and not as 1. Below 0.05 it cannot stay.

    Attributes:
        scale: (1, 1) s; weight decay on it pulls the norm towards log(2) + 0.05.
        u: (out,) left singular vector, a buffer.
        v: (in,) right singular vector, a buffer.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, kept: bool = False) -> None:
        super().__init__()
        # From a generator of its own: what is built afterwards draws the same numbers without it.
        u = torch.randn(len(weight), generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("u", F.normalize(u, dim=0).to(weight))
        self.register_buffer("v", weight.new_zeros(weight.shape[1]))
        self._iterate(weight.detach(), _FIRST_ITERATIONS)
        norm = _norm(weight.detach(), self.u, self.v) if kept else weight.new_ones(())
        # softplus(scale) + floor = norm; two-dimensional, like all that is decayed
        start = (norm.double() - _FLOOR).clamp(min=_EPS).expm1().log()
        self.scale = nn.Parameter(start.to(weight.dtype).view(1, 1))

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


class SpectralRows(nn.Module):
    """One parametrisation for each of several blocks of rows, as of queries, keys and values.

    Args:
        weight: (out, in).
        blocks: equal parts of its rows.
        kept: see `SpectralScale`.
    """

    def __init__(self, weight: Tensor, blocks: int, *, kept: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SpectralScale(part, kept=kept) for part in weight.chunk(blocks))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, (out, in)."""
        parts = weight.chunk(len(self.blocks))
        return torch.cat([block(part) for block, part in zip(self.blocks, parts, strict=True)])


def effective_weight(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The effective weight from what a state dict holds of its parametrisation.

    Args:
        weight: (out, in) the one that is trained.
        state: of a `SpectralScale`, or of a `SpectralRows`.
    """
    if "scale" in state:
        return _effective(weight, state["scale"], state["u"], state["v"])
    blocks = sum(name.endswith(".scale") for name in state)
    parts = [
        _effective(part, *(state[f"blocks.{i}.{name}"] for name in ("scale", "u", "v")))
        for i, part in enumerate(weight.chunk(blocks))
    ]
    return torch.cat(parts)


def _norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.dot(u, torch.mv(weight, v))


def _effective(weight: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return weight * ((F.softplus(scale) + _FLOOR) / _norm(weight, u, v).clamp(min=_EPS))


def _reparametrised(linear: nn.Linear) -> bool:
    if not parametrize.is_parametrized(linear, "weight"):
        return False
    chains = cast(nn.ModuleDict, linear.parametrizations)
    return any(isinstance(p, SpectralScale | SpectralRows) for p in chains["weight"].children())


def spectral_reparametrise(module: nn.Module, *, kept: bool = False, fused: str = "") -> None:
    """Reparametrises the weight of every Linear in `module`, in place.

    Weights `NAME.weight` become `NAME.parametrizations.weight.original`; the scales are
    `NAME.parametrizations.weight.0.scale`.

    Args:
        module: whose Linears.
        kept: see `SpectralScale`.
        fused: name of Linears, within their parent, whose rows are three layers in one.

    Raises:
        RuntimeError: done already.
    """
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    if any(map(_reparametrised, linears.values())):
        raise RuntimeError("spectral_reparametrise: the module is reparametrised already")
    for name, linear in linears.items():
        is_fused = bool(fused) and name.rpartition(".")[2] == fused
        parametrisation: nn.Module = (
            SpectralRows(linear.weight, 3, kept=kept)
            if is_fused
            else SpectralScale(linear.weight, kept=kept)
        )
        # unsafe: skips a trial run; the shape and the type stay by construction
        parametrize.register_parametrization(linear, "weight", parametrisation, unsafe=True)
