"""Encodes an image in tiles at the encoder's native resolution and stitches their maps.

The tiles do not overlap and are not blended. FeatSharp (arXiv 2502.16025) fuses the same tiles with
the upsampled map; by themselves they are the baseline `Tile` of its tables.
"""

import torch
from einops import rearrange
from torch import Tensor

from teachers.features import Features, FeatureSpec
from teachers.upsamplers.resize import resize, scaled
from teachers.upsamplers.upsampler import Encode, FactorConfig, UpsampledFeatures, Upsampler


def split_tiles(maps: Tensor, factor: tuple[int, int]) -> Tensor:
    """Cuts (B, D, nh * h, nw * w) into tiles (B * nh * nw, D, h, w), row-major in an image."""
    return rearrange(maps, "b d (nh h) (nw w) -> (b nh nw) d h w", nh=factor[0], nw=factor[1])


def join_tiles(tiles: Tensor, factor: tuple[int, int]) -> Tensor:
    """The inverse of `split_tiles`."""
    return rearrange(tiles, "(b nh nw) d h w -> b d (nh h) (nw w)", nh=factor[0], nw=factor[1])


def encode_tiles(
    images: Tensor, encode: Encode, spec: FeatureSpec, factor: tuple[int, int]
) -> tuple[Features, Tensor]:
    """Encodes images whole and in tiles, in one call of the encoder, which splits its batches.

    Args:
        images: (B, 3, H, W) in [0, 1], at any size.
        encode: the encoder.
        spec: what it returns and accepts.
        factor: (nh, nw) tiles; with a single tile the image is encoded once only.

    Returns:
        The features of the whole images, and the stitched maps of their tiles,
        (B, D, nh * h, nw * w).
    """
    native = spec.resolution
    whole = resize(images, native)
    if factor == (1, 1):
        low = encode(whole)
        return low, low.spatial
    full = resize(images, scaled(native, factor))
    summary, spatial = encode(torch.cat([whole, split_tiles(full, factor)]))
    summary = None if summary is None else summary[: len(images)]
    low = Features(summary, spatial[: len(images)])
    return low, join_tiles(spatial[len(images) :], factor)


def num_tile_forwards(factor: tuple[int, int]) -> int:
    """Encoder passes of `encode_tiles` for an image: the whole image and its tiles."""
    tiles = factor[0] * factor[1]
    return 1 if tiles == 1 else 1 + tiles


class TileConfig(FactorConfig):
    """Tiling."""

    kind: str = "tile"


class Tile(Upsampler):
    """Stitches the maps of tiles."""

    Config = TileConfig

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples; see `Upsampler.forward`."""
        low, tiles = encode_tiles(images, encode, self.spec, self.factor)
        return UpsampledFeatures(low, Features(low.summary, tiles))

    @property
    def num_forwards(self) -> int:
        """The whole image and its tiles."""
        return num_tile_forwards(self.factor)
