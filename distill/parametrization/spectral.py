"""Spectral reparametrization: the largest singular value of each Linear is a parameter of its own.

The effective weight is W (softplus(s) + 0.05) / sigma(W), after Zhai et al. (arXiv 2303.06296), in
the form that FeatSharp and RADIO train with. The norm, softplus(s) + 0.05, starts at 1, which
rescales the initial weights, or at that of the weight, which does not. It serves training only:
`reparametrize.plain_weights` gives plain weights afterwards.

Each forward pass in training updates sigma by one step of power iteration. A module under
activation checkpointing must not use it, as that runs each forward pass twice.
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
    """The parametrization of one weight.

    Args:
        weight: (out, in).
        keep_norm: whether the norm starts at that of the weight, but at least at 0.05, instead of
            at 1.

    Attributes:
        scale: s, (1, 1); weight decay pulls the norm towards log(2) + 0.05.
        u: left singular vector, (out,), a buffer.
        v: right singular vector, (in,), a buffer.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, keep_norm: bool = False) -> None:
        super().__init__()
        # Its own generator: what is built afterwards must draw the same numbers as without it.
        u = torch.randn(len(weight), generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("u", F.normalize(u, dim=0).to(weight))
        self.register_buffer("v", weight.new_zeros(weight.shape[1]))
        self._iterate(weight.detach(), _FIRST_ITERATIONS)
        norm = _norm(weight.detach(), self.u, self.v) if keep_norm else weight.new_ones(())
        # solves softplus(scale) + floor = norm; two-dimensional, as only matrices are decayed
        start = (norm.double() - _FLOOR).clamp(min=_EPS).expm1().log()
        self.scale = nn.Parameter(start.to(weight.dtype).view(1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, (out, in)."""
        with no_autocast(weight):
            if self.training and torch.is_grad_enabled():
                self._iterate(weight.detach(), 1)
            # Copies, as another forward pass may write into the buffers before the backward pass.
            return _effective(weight, self.scale, self.u.clone(), self.v.clone())

    @torch.no_grad()
    def _iterate(self, weight: Tensor, steps: int) -> None:
        for _ in range(steps):
            self.v.copy_(F.normalize(torch.mv(weight.T, self.u), dim=0, eps=_EPS))
            self.u.copy_(F.normalize(torch.mv(weight, self.v), dim=0, eps=_EPS))


class SpectralRows(nn.Module):
    """Reparametrizes each of several blocks of rows by itself, such as queries, keys and values.

    Args:
        weight: (out, in).
        blocks: number of blocks, of equal size.
        keep_norm: see `SpectralScale`.
    """

    def __init__(self, weight: Tensor, blocks: int, *, keep_norm: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SpectralScale(rows, keep_norm=keep_norm) for rows in weight.chunk(blocks)
        )

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, (out, in)."""
        rows = weight.chunk(len(self.blocks))
        return torch.cat([block(r) for block, r in zip(self.blocks, rows, strict=True)])


def effective_weight(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The effective weight, (out, in).

    Args:
        weight: (out, in), the one that is trained.
        state: the state dict of its `SpectralScale` or `SpectralRows`.
    """
    if "scale" in state:
        return _effective(weight, state["scale"], state["u"], state["v"])
    blocks = sum(name.endswith(".scale") for name in state)
    rows = [
        _effective(r, *(state[f"blocks.{i}.{name}"] for name in ("scale", "u", "v")))
        for i, r in enumerate(weight.chunk(blocks))
    ]
    return torch.cat(rows)


def _norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.dot(u, torch.mv(weight, v))


def _effective(weight: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return weight * ((F.softplus(scale) + _FLOOR) / _norm(weight, u, v).clamp(min=_EPS))


def _is_reparametrized(linear: nn.Linear) -> bool:
    if not parametrize.is_parametrized(linear, "weight"):
        return False
    chains = cast(nn.ModuleDict, linear.parametrizations)
    return any(isinstance(p, SpectralScale | SpectralRows) for p in chains["weight"].children())


def spectral_reparametrize(module: nn.Module, *, keep_norm: bool = False, fused: str = "") -> None:
    """Reparametrizes the weight of every Linear in `module`, in place.

    A weight `NAME.weight` becomes `NAME.parametrizations.weight.original`; its scale is
    `NAME.parametrizations.weight.0.scale`.

    Args:
        module: which holds the Linears.
        keep_norm: see `SpectralScale`.
        fused: name, within their parent, of Linears whose rows are three layers in one.

    Raises:
        RuntimeError: the module is reparametrized already.
    """
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    if any(map(_is_reparametrized, linears.values())):
        raise RuntimeError("spectral_reparametrize: the module is reparametrized already")
    for name, linear in linears.items():
        scale: nn.Module
        if fused and name.rpartition(".")[2] == fused:
            scale = SpectralRows(linear.weight, 3, keep_norm=keep_norm)
        else:
            scale = SpectralScale(linear.weight, keep_norm=keep_norm)
        # unsafe: skips a trial run, as shape and type stay the same
        parametrize.register_parametrization(linear, "weight", scale, unsafe=True)
