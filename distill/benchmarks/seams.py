"""How visible the borders between tiles are in a map that was made tile by tile."""

import torch
from torch import Tensor


class SeamRatio:
    """Collects steps between neighbouring cells, in float64.

    Args:
        tiles: along each axis.
        cells: of the map within a cell of the encoder that was upsampled, along each axis. Steps
            within an encoder's cell are smaller than those between two, seam or not.
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
        """What ranks add up: sum and count of squared steps at seams, then elsewhere, (4,)."""
        return torch.tensor([*self._sums["seams"], *self._sums["elsewhere"]], dtype=torch.float64)

    def value(self) -> float | None:
        """The ratio over all that was added, see `seam_ratio`."""
        return seam_ratio(self.sums())


def seam_ratio(sums: Tensor) -> float | None:
    """Mean squared step across seams over that elsewhere, at the same places of encoders' cells.

    About 1 where no seam is seen; None where there is no seam, or no step elsewhere.

    Args:
        sums: as of `SeamRatio.sums`.
    """
    seams, num_seams, others, num_others = sums.tolist()
    if not num_seams or not others:
        return None
    return float(seams / num_seams / (others / num_others))
