"""Visibility of the borders between tiles in a map that was computed tile by tile."""

import torch
from torch import Tensor


class SeamRatio:
    """Accumulates squared differences of neighbouring cells, in float64.

    Args:
        tiles: number along each axis.
        cells: of the map for each cell of the upsampled encoder, along each axis. Differences
            within a cell of the encoder are smaller than those between two, seam or not.
    """

    def __init__(self, tiles: tuple[int, int], cells: tuple[int, int]) -> None:
        self._tiles, self._cells = tiles, cells
        self._sums = {"seams": [0.0, 0], "elsewhere": [0.0, 0]}

    def add(self, maps: Tensor) -> None:
        """Adds maps (B, D, h, w); h and w are multiples of the tiles."""
        for axis, tiles, cells in zip((-2, -1), self._tiles, self._cells, strict=True):
            if tiles > 1:
                steps = maps.double().diff(dim=axis).square().movedim(axis, 0)
                place = torch.arange(1, maps.shape[axis], device=maps.device)
                seam = place % (maps.shape[axis] // tiles) == 0
                alike = torch.isin(place % cells, place[seam] % cells)
                for name, chosen in (("seams", seam), ("elsewhere", alike & ~seam)):
                    self._sums[name][0] += float(steps[chosen].sum())
                    self._sums[name][1] += steps[chosen].numel()

    def sums(self) -> Tensor:
        """Sum and count of squared differences at seams, then elsewhere, (4,); ranks add them."""
        return torch.tensor([*self._sums["seams"], *self._sums["elsewhere"]], dtype=torch.float64)

    def value(self) -> float | None:
        """The ratio of all maps that were added, see `seam_ratio`."""
        return seam_ratio(self.sums())


def seam_ratio(sums: Tensor) -> float | None:
    """Mean squared difference across seams, divided by that elsewhere between encoder cells.

    About 1 if seams are invisible; None if there is no seam, or no difference elsewhere.

    Args:
        sums: as of `SeamRatio.sums`.
    """
    seams, num_seams, others, num_others = sums.tolist()
    if not num_seams or not others:
        return None
    return float(seams / num_seams / (others / num_others))
