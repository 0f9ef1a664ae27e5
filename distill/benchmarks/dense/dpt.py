"""The dense prediction head of DPT (Ranftl et al. 2021, arXiv 2103.13413), on four layers.

Each map is projected to a common width. The maps of a ViT, all on one grid, are resized to 4, 2, 1
and 1/2 of it; those of a CNN stay on their own grids. They are then fused from the coarsest to the
finest by residual convolution units. All resizing is bilinear with half-pixel centres, where the
paper has transposed convolutions, so that no step shifts the map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NUM_LAYERS = 4
_SCALES = (4.0, 2.0, 1.0, 0.5)  # of the grid of a ViT, from its first layer to its last


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions with batch norms, added to their input.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [
                nn.ReLU(),
                nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                nn.BatchNorm2d(dim),
            ]
        self.inner = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) to the same shape."""
        return maps + self.inner(maps)


class DPTHead(nn.Module):
    """Maps of four layers to one.

    Args:
        dims: channels of each layer's map.
        out_dim: channels of the result.
        hidden_dim: channels of all layers between.
    """

    def __init__(self, dims: Sequence[int], out_dim: int, hidden_dim: int) -> None:
        super().__init__()
        assert len(dims) == NUM_LAYERS
        self.project = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, hidden_dim, 1)) for dim in dims
        )
        self.skip = nn.ModuleList(ResidualUnit(hidden_dim) for _ in dims[:-1])
        self.fuse = nn.ModuleList(ResidualUnit(hidden_dim) for _ in dims)
        self.out = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, out_dim, 1),
        )

    def forward(self, *maps: Tensor) -> Tensor:
        """Fuses the maps of four layers to one prediction.

        Args:
            maps: (B, D, h, w) from the first of the layers to the last.

        Returns:
            (B, out_dim, h', w'), on the finest grid.
        """
        grids = _grids(maps)
        parts = [
            _resized(project(each), grid)
            for project, each, grid in zip(self.project, maps, grids, strict=True)
        ]
        fused = self.fuse[-1](parts[-1])
        for level in reversed(range(NUM_LAYERS - 1)):
            fused = _resized(fused, grids[level]) + self.skip[level](parts[level])
            fused = self.fuse[level](fused)
        return self.out(fused)


def _grids(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The (h, w) at which each map is fused."""
    own = [(each.shape[-2], each.shape[-1]) for each in maps]
    if len(set(own)) > 1:
        return own
    return [
        (max(1, round(h * scale)), max(1, round(w * scale)))
        for (h, w), scale in zip(own, _SCALES, strict=True)
    ]


def _resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)
