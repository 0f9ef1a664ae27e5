"""The encoder of JAFAR and AnyUp, which computes queries and keys from the image.

After JAFAR (arXiv 2506.11136); AnyUp (arXiv 2510.12764) uses the same encoder. Three differences:

- the image is pooled to at most twice the output grid per axis first, because the maps are pooled
  to that grid later, and at full size the encoder takes nearly all of the time;
- 3 x 3 convolutions repeat the border cell, which works for any grid, and 1 x 1 convolutions have
  no padding;
- each rotary pair turns by one angle, so that it stays a rotation while frequencies are learned.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.precision import at_least_float32

DIM = 128  # of queries and keys, both papers
_GROUPS = 8
_PIXELS_PER_CELL = 2  # at most, of the output grid, per axis
_THETA = 100.0  # ratio of the highest to the lowest initial frequency


def group_norm(maps: Tensor) -> Tensor:
    """GroupNorm without parameters of (B, DIM, H, W)."""
    return F.group_norm(at_least_float32(maps), _GROUPS)


def conv3x3(in_dim: int, out_dim: int) -> nn.Conv2d:
    """A 3 x 3 convolution without bias that repeats border cells."""
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, padding_mode="replicate", bias=False)


def projection() -> nn.Sequential:
    """RMSNorm and a linear layer, which project tokens (..., DIM) to queries or keys.

    No bias: that of keys would cancel in the softmax.
    """
    return nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, DIM, bias=False))


class ResidualBlock(nn.Module):
    """Two pre-activation 1 x 1 convolutions: x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, DIM) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(DIM, DIM, 1) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, DIM, H, W) to the same shape."""
        inner = maps
        for norm, conv in zip(self.norms, self.convs, strict=True):
            inner = conv(F.silu(norm(inner)))
        return maps + inner


def pointwise_encoder(in_dim: int) -> nn.Sequential:
    """A 1 x 1 convolution to DIM channels and two residual blocks."""
    return nn.Sequential(nn.Conv2d(in_dim, DIM, 1), ResidualBlock(), ResidualBlock())


class RotaryCoordinates(nn.Module):
    """Rotates channel pairs (j, j + DIM / 2) by angles that are linear in the position.

    Positions are those of cell centres in (0, 1), for any grid. Initially one half of the pairs
    turns with y and the other half with x; both frequencies of all pairs are learned.
    """

    def __init__(self) -> None:
        super().__init__()
        axis = 2 * math.pi * _THETA ** -torch.linspace(0, 1, DIM // 4)
        still = torch.zeros_like(axis)
        both = [torch.cat([axis, still]), torch.cat([still, axis])]
        self.frequencies = nn.Parameter(torch.stack(both))  # (y and x, DIM / 2)

    def forward(self, maps: Tensor) -> Tensor:
        """Rotates (B, DIM, H, W)."""
        phases = []
        for axis, size in enumerate(maps.shape[-2:]):
            frequencies = at_least_float32(self.frequencies[axis])
            place = torch.arange(size, device=maps.device, dtype=frequencies.dtype).add(0.5) / size
            angle = frequencies[:, None] * place
            phases.append((angle.cos(), angle.sin()))
        (cy, sy), (cx, sx) = phases
        # cos(y + x) and sin(y + x) by the addition theorems: sines along the axes only.
        cos = cy[:, :, None] * cx[:, None] - sy[:, :, None] * sx[:, None]
        sin = sy[:, :, None] * cx[:, None] + cy[:, :, None] * sx[:, None]
        first, second = maps.chunk(2, dim=1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=1)


class GuidanceEncoder(nn.Module):
    """Computes queries for all output cells and keys for all low-resolution cells from images."""

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
            high: (H', W'), the output grid.

        Returns:
            Queries (B, DIM, *high), and group-normalised keys (B, DIM, *low).
        """
        size = read_size((images.shape[-2], images.shape[-1]), high)
        maps = self.rotary(self.trunk(guidance(images, size)))
        queries = F.adaptive_avg_pool2d(self.query(maps), high)
        keys = F.adaptive_avg_pool2d(self.key(maps), low)
        return self.query_conv(group_norm(queries)), group_norm(keys)


def read_size(image: tuple[int, int], high: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels to which an image is pooled for the output grid `high`."""
    return (
        max(high[0], min(_PIXELS_PER_CELL * high[0], image[0])),
        max(high[1], min(_PIXELS_PER_CELL * high[1], image[1])),
    )
