"""Pictures of matches: two images side by side, and lines between matched points."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

HEIGHT = 320  # pixels of an image
_GAP, _DOT = 8, 4
_RIGHT, _WRONG = (40, 170, 70), (215, 45, 45)


class Matches(NamedTuple):
    """The matches of two images.

    Attributes:
        images: source and target, each (H, W, 3) uint8.
        source: (N, 2) points as x, y in pixels.
        target: (N, 2) the matched points.
        right: (N,) whether the match is correct.
    """

    images: tuple[np.ndarray, np.ndarray]
    source: np.ndarray
    target: np.ndarray
    right: np.ndarray


def draw_matches(path: Path, rows: Sequence[Matches]) -> None:
    """Draws one row for each pair: green lines are correct matches, red ones wrong."""
    pictures = [_draw(row) for row in rows]
    height = len(pictures) * (HEIGHT + _GAP) - _GAP
    sheet = Image.new("RGB", (max(p.width for p in pictures), height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (0, number * (HEIGHT + _GAP)))
    sheet.save(path)


def _draw(row: Matches) -> Image.Image:
    scales = [HEIGHT / len(image) for image in row.images]
    shown = [
        Image.fromarray(image).resize((round(image.shape[1] * scale), HEIGHT))
        for image, scale in zip(row.images, scales, strict=True)
    ]
    offset = shown[0].width + _GAP
    sheet = Image.new("RGB", (offset + shown[1].width, HEIGHT), "white")
    sheet.paste(shown[0], (0, 0))
    sheet.paste(shown[1], (offset, 0))
    draw = ImageDraw.Draw(sheet)
    starts = row.source * scales[0]
    ends = row.target * scales[1] + np.array([offset, 0])
    for start, end, right in zip(starts, ends, row.right, strict=True):
        draw.line([*start, *end], fill=_RIGHT if right else _WRONG, width=2)
    for number, points in enumerate(zip(starts, ends, strict=True)):
        red, green, blue = colorsys.hsv_to_rgb(number / len(starts), 0.9, 1)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        for x, y in points:
            box = (x - _DOT, y - _DOT, x + _DOT, y + _DOT)
            draw.ellipse(box, fill=colour, outline="white")
    return sheet
