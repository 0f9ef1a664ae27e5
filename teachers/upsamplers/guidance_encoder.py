"""What JAFAR and AnyUp share: the encoder that turns the image into queries and keys.

After JAFAR (arXiv 2506.11136), whose encoder AnyUp (arXiv 2510.12764) takes over. Three things
are ours:

- it reads the image at no more than twice the output grid per axis, area-pooled, because its
  maps are pooled to that grid anyway, and at full size it is nearly all of the public time;
- 3 x 3 convolutions repeat the border cell, which is defined for any grid, and 1 x 1 ones do not
  pad at all;
- a rotary pair turns by one angle, so that it stays a rotation while the frequencies are learned.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.precision import at_least_float32

DIM = 128  # of queries and keys, both papers
_GROUPS = 8
_PIXELS_PER_CELL = 2  # of the output grid, per axis
_THETA = 100.0  # ratio of the highest to the lowest initial frequency


def standardised(maps: Tensor) -> Tensor:
    """GroupNorm without parameters, (B, DIM, H, W)."""
    return F.group_norm(at_least_float32(maps), _GROUPS)


def conv3x3(in_dim: int, out_dim: int) -> nn.Conv2d:
    """Without bias, border cells repeated."""
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, padding_mode="replicate", bias=False)


def projection() -> nn.Sequential:
    """RMSNorm and a linear map of tokens (..., DIM), as the attention's queries and keys take.

    No bias: for keys the softmax cancels it.
    """
    return nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, DIM, bias=False))


class ResidualBlock(nn.Module):
    """Two pre-activated 1 x 1 convolutions: x + conv(act(norm(conv(act(norm(x)))))).

    Maps are (B, DIM, H, W).
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, DIM) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(DIM, DIM, 1) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        """Same shape out."""
        inner = maps
        for norm, conv in zip(self.norms, self.convs, strict=True):
            inner = conv(F.silu(norm(inner)))
        return maps + inner


def pointwise_encoder(in_dim: int) -> nn.Sequential:
    """A 1 x 1 convolution to DIM channels and two residual blocks."""
    return nn.Sequential(nn.Conv2d(in_dim, DIM, 1), ResidualBlock(), ResidualBlock())


class RotaryCoordinates(nn.Module):
    """Rotates channel pairs (j, j + DIM / 2) by angles linear in the position.

    Positions are those of cell centres in (0, 1), so that any grid sees the same field. At first
    one half of the pairs turns with y and the other with x; both frequencies of all are learned.
    """

    def __init__(self) -> None:
        super().__init__()
        axis = 2 * math.pi * _THETA ** -torch.linspace(0, 1, DIM // 4)
        still = torch.zeros_like(axis)
        both = [torch.cat([axis, still]), torch.cat([still, axis])]
        self.frequencies = nn.Parameter(torch.stack(both))  # (y and x, DIM / 2)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, DIM, H, W) in and out."""
        phases = []
        for axis, size in enumerate(maps.shape[-2:]):
            frequencies = at_least_float32(self.frequencies[axis])
            place = torch.arange(size, device=maps.device, dtype=frequencies.dtype).add(0.5) / size
            angle = frequencies[:, None] * place
            phases.append((angle.cos(), angle.sin()))
        (cy, sy), (cx, sx) = phases
        # cos(y + x) and sin(y + x) from the two axes, not from every cell: no sine a pixel
        cos = cy[:, :, None] * cx[:, None] - sy[:, :, None] * sx[:, None]
        sin = sy[:, :, None] * cx[:, None] + cy[:, :, None] * sx[:, None]
        first, second = maps.chunk(2, dim=1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=1)


class GuidanceEncoder(nn.Module):
    """Queries for every output cell and keys for every low-resolution one, from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv3x3(3, DIM), ResidualBlock(), ResidualBlock())
        self.rotary = RotaryCoordinates()
        self.query = pointwise_encoder(DIM)
        self.query_conv = conv3x3(DIM, DIM)
        self.key = pointwise_encoder(DIM)

    def forward(
        self, images: Tensor, low: tuple[int, int], high: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Encodes the image.

        Args:
            images: (B, 3, H, W) in [0, 1], at any size.
            low: (h, w), the encoder's grid.
            high: the output grid.

        Returns:
            Queries (B, DIM, *high), and keys (B, DIM, *low), standardised within groups.
        """
        size = read_size((images.shape[-2], images.shape[-1]), high)
        maps = self.rotary(self.trunk(guidance(images, size)))
        queries = F.adaptive_avg_pool2d(self.query(maps), high)
        keys = F.adaptive_avg_pool2d(self.key(maps), low)
        return self.query_conv(standardised(queries)), standardised(keys)


def read_size(image: tuple[int, int], high: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which an image is read for the output grid `high`."""
    return (
        max(high[0], min(_PIXELS_PER_CELL * high[0], image[0])),
        max(high[1], min(_PIXELS_PER_CELL * high[1], image[1])),
    )
