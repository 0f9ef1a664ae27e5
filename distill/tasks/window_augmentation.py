"""Windows as augmentation: in some steps, attention runs within windows, as in ViTDet.

As in NVIDIA TAO's port of the RADIO trainer, but for grids of any shape. The draw depends on the
seed and the step only, so that all ranks take equally long. The trained student can then be run
with windows on large images: `Student.forward(images, window)`.
"""

import torch
from pydantic import Field, PositiveInt

from distill.runtime import distributed
from teachers.config import StrictConfig


class WindowAugmentationConfig(StrictConfig):
    """The frequency and the sizes of windows.

    Attributes:
        probability: of a step with windows. AM-RADIO is said to have used 0.05 at low and 0.99 at
            high resolution.
        sizes: sides in patches, drawn uniformly from those that divide both sides of the grid into
            more than one window; if none does, attention is global.
    """

    probability: float = Field(0.0, ge=0, le=1)
    sizes: tuple[PositiveInt, ...] = Field((6, 7, 8, 9, 12, 16), min_length=1)


def fitting_windows(config: WindowAugmentationConfig, grid: tuple[int, int]) -> list[int]:
    """The sides that divide both sides of a grid (h, w) into more than one window."""
    return [s for s in config.sizes if grid[0] % s == grid[1] % s == 0 and s < max(grid)]


def draw_window(
    config: WindowAugmentationConfig, grid: tuple[int, int], seed: int, step: int
) -> int | None:
    """Draws the side in patches of a step's windows on a grid (h, w); None: global attention."""
    fitting = fitting_windows(config, grid)
    generator = torch.Generator().manual_seed(distributed.derive_seed(seed, "windows", step))
    if torch.rand((), generator=generator) >= config.probability or not fitting:
        return None
    return fitting[int(torch.randint(len(fitting), (), generator=generator))]


def window_shares(
    config: WindowAugmentationConfig, grid: tuple[int, int]
) -> dict[int | None, float]:
    """The values that `draw_window` may return, with their probabilities above 0."""
    fitting = fitting_windows(config, grid) if config.probability else []
    if not fitting:
        return {None: 1.0}
    shares: dict[int | None, float] = {None: 1 - config.probability}
    for side in fitting:  # a side may be listed twice
        shares[side] = shares.get(side, 0.0) + config.probability / len(fitting)
    return {side: share for side, share in shares.items() if share}
