"""Encodes the image in tiles at the encoder's native resolution and stitches their maps.

The tiles do not overlap and are not blended. FeatSharp (arXiv 2502.16025) takes its detail from
the same tiles; alone, they are the baseline `Tile` of its tables.
"""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from teachers.features import Features
from teachers.upsamplers.resize import Factor, resize
from teachers.upsamplers.upsampler import Encode, UpsampledFeatures, Upsampler, UpsamplerConfig


def split_tiles(maps: Tensor, factor: tuple[int, int]) -> Tensor:
    """Cuts maps in nh x nw tiles.

    Args:
        maps: (B, D, nh * h, nw * w).
        factor: (nh, nw).

    Returns:
        (B * nh * nw, D, h, w), an image's tiles row by row.
    """
    return rearrange(maps, "b d (nh h) (nw w) -> (b nh nw) d h w", nh=factor[0], nw=factor[1])


def join_tiles(tiles: Tensor, factor: tuple[int, int]) -> Tensor:
    """The exact inverse of `split_tiles`."""
    return rearrange(tiles, "(b nh nw) d h w -> b d (nh h) (nw w)", nh=factor[0], nw=factor[1])


class TileConfig(UpsamplerConfig):
    """Tiling.

    Attributes:
        factor: tiles along the height and the width; one number for both, or [height, width].
    """

    kind: str = "tile"
    factor: Factor


class Tile(Upsampler):
    """A map of tiles. Whole images and tiles go to the encoder together, which bounds its batch."""

    Config: ClassVar[type[UpsamplerConfig]] = TileConfig

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples; see `Upsampler.forward`."""
        native = self.spec.resolution
        whole = resize(images, native)
        if self.factor == (1, 1):
            low = encode(whole)
            return UpsampledFeatures(low, low)
        full = resize(images, (self.factor[0] * native[0], self.factor[1] * native[1]))
        summary, spatial = encode(torch.cat([whole, split_tiles(full, self.factor)]))
        summary = None if summary is None else summary[: len(images)]
        stitched = join_tiles(spatial[len(images) :], self.factor)
        low = Features(summary, spatial[: len(images)])
        return UpsampledFeatures(low, Features(summary, stitched))

    @property
    def num_forwards(self) -> int:
        """The whole image and its nh * nw tiles; one where the tile is the image."""
        tiles = self.factor[0] * self.factor[1]
        return 1 if tiles == 1 else 1 + tiles
