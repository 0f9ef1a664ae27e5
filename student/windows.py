"""Attention within windows, ViTDet's way (Li et al., arXiv 2203.16527), for grids of any shape.

The patches are put in the order of windows once. Most blocks then see each window as an image of
its own; a few evenly spaced ones, and the last, see all of it, where the order does not matter.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor


def window_order(grid: tuple[int, int], window: int) -> Tensor:
    """The numbers of the patches, in row-major order, of one window after another, (h * w,)."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    return rearrange(numbers, "(h y) (w x) -> (h w y x)", y=window, x=window)


def global_blocks(depth: int, num_global: int) -> set[int]:
    """The blocks that attend globally: the last of each depth // num_global, and the last of all.

    All of them where depth is less than twice `num_global`, one more than that where stretches
    leave a rest (radio-training.md 1.8).
    """
    period = max(1, depth // num_global)
    return {i for i in range(depth) if i % period == period - 1} | {depth - 1}


class Windows:
    """Tokens as windows and back.

    Args:
        prefix: number of class tokens and registers.
        count: patches in a window.
        mode: what becomes of the prefix, see `WindowConfig.prefix`.
    """

    def __init__(self, prefix: int, count: int, mode: Literal["copy", "drop"]) -> None:
        self._prefix, self._count, self._mode = prefix, count, mode
        self._kept: Tensor | None = None

    def split(self, tokens: Tensor) -> Tensor:
        """(B, prefix + h * w, C) in the order of windows to (B * windows, n, C)."""
        head, patches = tokens.split([self._prefix, tokens.shape[1] - self._prefix], dim=1)
        windows = rearrange(patches, "b (n t) c -> b n t c", t=self._count)
        if self._mode == "drop":
            self._kept = head
        else:
            copies = head[:, None].expand(-1, windows.shape[1], -1, -1)
            windows = torch.cat([copies, windows], dim=2)
        return windows.flatten(0, 1)

    def join(self, windows: Tensor, batch: int) -> Tensor:
        """What `split` made, after any number of blocks, to (B, prefix + h * w, C)."""
        windows = rearrange(windows, "(b n) t c -> b n t c", b=batch)
        head = self._kept
        if head is None:
            copies, windows = windows.split([self._prefix, self._count], dim=2)
            head = copies.mean(1)
        return torch.cat([head, windows.flatten(1, 2)], dim=1)
