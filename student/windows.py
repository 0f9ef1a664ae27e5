"""Attention within windows (ViTDet; Li et al., arXiv 2203.16527, section 3), for any grid.

The patches are put in the order of windows once. Most blocks then process each window as an image
of its own. A few evenly spaced blocks, and the last, attend to all patches, whatever their order.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor


def window_order(grid: tuple[int, int], window: int) -> Tensor:
    """Row-major indices (h * w,) of the patches, one window after another."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    return rearrange(numbers, "(h y) (w x) -> (h w y x)", y=window, x=window)


def global_blocks(depth: int, num_global: int) -> set[int]:
    """Indices of the blocks with global attention.

    The last of every depth // num_global blocks, and the last of all. These are `num_global`
    blocks, more where the division leaves a remainder, and all where depth < 2 * num_global.
    """
    period = max(1, depth // num_global)
    return {i for i in range(depth) if i % period == period - 1} | {depth - 1}


class Windows:
    """Splits tokens into windows and joins them again.

    Args:
        prefix: number of class tokens and registers.
        count: patches in a window.
        mode: treatment of the prefix, see `WindowConfig.prefix`.
    """

    def __init__(self, prefix: int, count: int, mode: Literal["copy", "drop"]) -> None:
        self._prefix, self._count, self._mode = prefix, count, mode
        self._kept: Tensor | None = None

    def split(self, tokens: Tensor) -> Tensor:
        """Splits (B, prefix + h * w, C), in the order of windows, into (B * windows, n, C)."""
        head, patches = tokens.split([self._prefix, tokens.shape[1] - self._prefix], dim=1)
        windows = rearrange(patches, "b (n t) c -> b n t c", t=self._count)
        if self._mode == "drop":
            self._kept = head
        else:
            copies = head[:, None].expand(-1, windows.shape[1], -1, -1)
            windows = torch.cat([copies, windows], dim=2)
        return windows.flatten(0, 1)

    def join(self, windows: Tensor, batch: int) -> Tensor:
        """Joins the output of `split`, after any blocks, into (B, prefix + h * w, C)."""
        windows = rearrange(windows, "(b n) t c -> b n t c", b=batch)
        head = self._kept
        if head is None:
            copies, windows = windows.split([self._prefix, self._count], dim=2)
            head = copies.mean(1)
        return torch.cat([head, windows.flatten(1, 2)], dim=1)
