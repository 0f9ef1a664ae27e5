"""FeatSharp's fusion block: local attention and a SwiGLU over several maps of one image.

A pre-norm transformer block (arXiv 2502.16025, section 3) on the concatenated channels of its
inputs. The first input is the residual path: with a small LayerScale, a new block returns nearly
that input, and training learns what the other inputs add. The mean of several inputs can take its
place.

Unlike the public code, it does not pad the head dimension, and has separate projections instead of
fused ones (q, k, v; gate, value), which spectral reparametrisation treats one by one.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.upsamplers.local_attention import alibi_slopes, local_attention
from teachers.upsamplers.precision import compute_dtype

_ROPE_BASE = 50_000.0


class FusionBlock(nn.Module):
    """Fuses maps of the same size; the first is the residual path.

    Args:
        dims: channels of each input; the output has those of the first.
        num_heads: attention heads; divides the sum of `dims`.
        window: cells along each side of the attention window, odd.
        position: `alibi` penalises distance, in rows in even heads and in columns in odd heads;
            `rope` rotates queries and keys, half of the channels by row, half by column.
        norm: LayerNorm before attention and SwiGLU; False for neither (the later public default).
        layer_scale: initial LayerScale; 1e-6 in the paper, which needs thousands of steps.
        mlp_ratio: width of the SwiGLU, see `hidden_dim`; 4 in the paper.
        residual: numbers of the inputs whose mean is the residual path, all as wide as the first.

    Raises:
        TeacherError: the heads do not divide the channels, the window is even, or rope cannot pair
            the channels.
    """

    slopes: Tensor | None

    def __init__(
        self,
        dims: Sequence[int],
        *,
        num_heads: int = 16,
        window: int = 7,
        position: Literal["alibi", "rope"] = "alibi",
        norm: bool = True,
        layer_scale: float = 1e-6,
        mlp_ratio: float = 4.0,
        residual: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        dim, out = sum(dims), dims[0]
        _check(dim, num_heads, window, position)
        self.dims, self.num_heads = tuple(dims), num_heads
        self.residual = tuple(residual)
        self.window, self.position = window, position
        slopes = alibi_slopes(num_heads) if position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-5) if norm else nn.Identity()
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.attention_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-5) if norm else nn.Identity()
        hidden = hidden_dim(dim, mlp_ratio)
        self.gate = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, out)
        self.mlp_scale = nn.Parameter(torch.full((out,), layer_scale))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Fuses maps.

        Args:
            inputs: (B, dims[i], H, W) each, fastest in channels-last memory.

        Returns:
            (B, dims[0], H, W), channels-last in memory.

        Raises:
            ValueError: the channels are not `dims`.
        """
        came = tuple(x.shape[1] for x in inputs)
        if came != self.dims:
            raise ValueError(f"inputs of {came} channels: expected {self.dims}")
        x = torch.cat([rearrange(x, "b d h w -> b h w d") for x in inputs], dim=-1)
        x = x + self.attention_scale * self._attention(self.attention_norm(x))
        hidden = self.mlp_norm(x)
        hidden = self.down(F.silu(self.gate(hidden)) * self.value(hidden))
        fused = self._residual(x) + self.mlp_scale * hidden
        return rearrange(fused, "b h w d -> b d h w")

    def _residual(self, x: Tensor) -> Tensor:
        parts = x.split(self.dims, dim=-1)
        first, *others = (parts[i] for i in self.residual)
        for other in others:
            first = first + other
        return first / len(self.residual) if others else first

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.position == "rope":
            cosine, sine = _rotation(x)
            q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        q, k, v = (rearrange(y, "b h w (n d) -> b h w n d", n=self.num_heads) for y in (q, k, v))
        mixed = local_attention(q, k, v.to(q.dtype), window=self.window, slopes=self.slopes)
        return self.proj(rearrange(mixed, "b h w n d -> b h w (n d)"))


def hidden_dim(dim: int, mlp_ratio: float = 4.0) -> int:
    """Hidden channels of the SwiGLU: two thirds of mlp_ratio * dim, rounded up to a multiple of 8.

    Two thirds, as it has three matrices where a plain MLP of that ratio has two.
    """
    return max((int(mlp_ratio * dim * 2 / 3) + 7) // 8 * 8, 8)


def _check(dim: int, num_heads: int, window: int, position: str) -> None:
    if dim % num_heads:
        near = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - num_heads))
        raise TeacherError(
            f"num_heads: {num_heads} heads do not divide the {dim} channels of all inputs; the "
            f"nearest divisor is {near}"
        )
    if window < 1 or window % 2 == 0:
        raise TeacherError(f"window: expected an odd number of cells, such as 7, got {window}")
    if position == "rope" and dim % 4:
        raise TeacherError(
            f"position: rope needs a multiple of 4 channels, half for rows and half for columns, "
            f"got {dim}; use alibi"
        )


def _rotation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (h, w, D / 2) each, for the pairs of channels of (B, h, w, D)."""
    _, h, w, dim = x.shape
    dtype = compute_dtype(x)
    pairs = torch.arange(dim // 4, device=x.device, dtype=dtype)
    frequencies = _ROPE_BASE ** (-pairs / (dim // 4))
    rows = torch.arange(h, device=x.device, dtype=dtype)[:, None, None] * frequencies
    columns = torch.arange(w, device=x.device, dtype=dtype)[:, None] * frequencies
    angles = torch.cat([rows.expand(h, w, -1), columns.expand(h, w, -1)], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2)
