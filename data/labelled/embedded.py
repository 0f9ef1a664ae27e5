"""The embedded benchmark: textured shapes on photographs, drawn by this module, with exact labels.

It needs no download, so that a first run ends with a dense metric. It is synthetic: its metrics
compare encoders with each other, or a student with itself before training, and show whether maps
represent textures and their borders. They do not transfer to objects, scenes or real sets, and no
paper reports them.

A class is a pattern. The angle, scale and outline of a shape have the same distribution for all
classes, and its two colours are pixels of the photograph behind it, so that neither colours nor
outlines distinguish classes. Backgrounds are crops of the three photographs that the quickstart
holds out: its students have not seen them.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt

from data.labelled.layout import Split
from data.labelled.segmentation_files import PixelSample, SegmentationSet
from data.photographs import PHOTOGRAPHS, Photograph, photograph_path
from data.seeds import sample_rng

SIDE = 256  # pixels of an image

_SHAPES = 5  # for each image; later ones cover earlier ones
_RADIUS = (36.0, 84.0)  # mean radius of a shape, pixels
_PERIOD = (14.0, 26.0)  # of a pattern, pixels
_OPACITY = (0.85, 1.0)  # of a shape over the photograph
_SHARPNESS = 4.0  # of a pattern's edges; low enough to avoid aliasing
_LOBES = ((2, 0.35), (3, 0.2), (5, 0.1))  # of an outline: number, largest share of the radius
_DRAWS = 8  # candidate pixels for the two colours of a pattern
_CONTRAST = 0.5  # smallest difference of a pattern's two colours, clipped to [0, 1]

# Coordinates (H, W) in periods, centred on the shape, to a wave in [-1, 1].
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _wave(u: np.ndarray) -> np.ndarray:
    return np.cos(2 * math.pi * u)


_PATTERNS: dict[str, Pattern] = {
    "plain": lambda u, v: np.ones_like(u),
    "stripes": lambda u, v: _wave(u),
    "checks": lambda u, v: _wave(u / 1.4) * _wave(v / 1.4),
    "dots": lambda u, v: _wave(u) + _wave(v) - 0.6,
    "rings": lambda u, v: _wave(np.hypot(u, v)),
    "zigzag": lambda u, v: _wave(u + np.abs((v / 1.5) % 1 - 0.5) * 2),
}


class EmbeddedSegmentation(SegmentationSet):
    """Six patterns on photographs of 256 x 256 px, seven classes; images are drawn when read.

    Attributes:
        train_images: number of training images.
        test_images: number of test images.
        seed: of the set.
    """

    kind: Literal["embedded"]
    train_images: PositiveInt = 240
    test_images: PositiveInt = 120
    seed: NonNegativeInt = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The background, then the patterns."""
        return ("photograph", *_PATTERNS)

    def samples(self, split: Split) -> list[PixelSample]:
        """The images of a split; the paths are only names, not files."""
        count = self.train_images if split == "train" else self.test_images
        keys = [f"{split}-{number:04d}" for number in range(count)]
        return [PixelSample(Path(f"{key}.jpg"), Path(f"{key}.png"), key) for key in keys]

    def read(self, sample: PixelSample) -> tuple[np.ndarray, np.ndarray]:
        """Draws an image and its labels; no pixel is ignored.

        Raises:
            DataError: the photographs are not installed.
        """
        image, labels = _drawn(self.seed, sample.key)
        return image.copy(), labels.copy()


@lru_cache(maxsize=1024)  # 0.2 MB each; every encoder of a suite reads the same images
def _drawn(seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    rng = sample_rng(seed, 0, key)
    held_out = [photograph for photograph in PHOTOGRAPHS if not photograph.scales]
    photograph = _background(held_out[_below(len(held_out), rng)], rng)
    image, labels = photograph.copy(), np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(_SHAPES):
        label, colours = 1 + _below(len(_PATTERNS), rng), _two_colours(photograph, rng)
        _draw_shape(image, labels, label, colours, rng)
    return (image * 255).round().astype(np.uint8), labels


@cache
def _pixels(photograph: Photograph) -> Image.Image:
    with Image.open(photograph_path(photograph)) as opened:
        return opened.convert("RGB")


def _background(photograph: Photograph, rng: random.Random) -> np.ndarray:
    """A square crop of half to all of the shorter side, float64 (SIDE, SIDE, 3) in [0, 1]."""
    whole = _pixels(photograph)
    side = rng.uniform(0.5, 1.0) * min(whole.size)
    left, top = (rng.random() * (length - side) for length in whole.size)
    box = (left, top, left + side, top + side)
    crop = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box), np.float64) / 255
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _two_colours(photograph: np.ndarray, rng: random.Random) -> list[np.ndarray]:
    """The darkest and the brightest of some pixels, with enough contrast, in random order."""
    pixels = [photograph[_below(SIDE, rng), _below(SIDE, rng)] for _ in range(_DRAWS)]
    pixels.sort(key=lambda colour: float(colour.mean()))
    dark, bright = pixels[0], pixels[-1]
    push = max(0.0, _CONTRAST - float((bright - dark).mean())) / 2
    dark, bright = (dark - push).clip(0, 1), (bright + push).clip(0, 1)
    return [dark, bright] if rng.random() < 0.5 else [bright, dark]


def _draw_shape(
    image: np.ndarray,
    labels: np.ndarray,
    label: int,
    colours: Sequence[np.ndarray],
    rng: random.Random,
) -> None:
    """Draws one shape over an image and its labels."""
    rows, columns = (rng.random() * SIDE for _ in range(2))
    x, y = np.meshgrid(np.arange(SIDE) + 0.5 - columns, np.arange(SIDE) + 0.5 - rows)
    near = np.hypot(x, y) < _RADIUS[1] * (1 + sum(depth for _, depth in _LOBES))
    x, y = x[near], y[near]
    inside = np.hypot(x, y) < _outline(np.arctan2(y, x), rng)
    near[near] = inside
    period, angle = rng.uniform(*_PERIOD), rng.random() * 2 * math.pi
    along, across = math.cos(angle) / period, math.sin(angle) / period
    u, v = (along * x + across * y)[inside], (along * y - across * x)[inside]
    wave = list(_PATTERNS.values())[label - 1](u, v)
    share = 0.5 + 0.5 * np.tanh(_SHARPNESS * wave)[:, None]
    painted = share * colours[0] + (1 - share) * colours[1]
    opacity = rng.uniform(*_OPACITY)
    image[near] = opacity * painted + (1 - opacity) * image[near]
    labels[near] = label


def _outline(angles: np.ndarray, rng: random.Random) -> np.ndarray:
    """The radius of a smooth random shape at each angle, in pixels."""
    radius = np.ones_like(angles)
    for number, depth in _LOBES:
        phase = rng.random() * 2 * math.pi
        radius += depth * rng.random() * np.cos(number * angles + phase)
    return rng.uniform(*_RADIUS) * radius


def _below(limit: int, rng: random.Random) -> int:
    # Python guarantees only the values of `random.random` for all versions.
    return int(rng.random() * limit)
