"""Draws pictures in columns with titles: a row for each image, and groups of columns."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.display.text import picture_text

HEIGHT = 192  # pixels of a panel
_GAP, _BETWEEN_GROUPS = 6, 24
_LETTERS = 14  # pixels, in a picture of up to `_WIDE`; larger ones are shown at a smaller scale
_WIDE = 1000
_SMALLEST = 8

Panels = Tensor | Sequence[Tensor]  # (B, 3, h, w), or pictures of several sizes


class Column(NamedTuple):
    """A column.

    Attributes:
        title: stands above it.
        panels: pictures (3, h, w) in [0, 1], one for each row.
        group: stands above all neighbours of the same group; empty for none.
        caption: lines that stand below it.
        smooth: whether its pictures are photographs. Cells of maps stay visible as squares:
            interpolation would invent detail.
    """

    title: str
    panels: Panels
    group: str = ""
    caption: Sequence[str] = ()
    smooth: bool = False


class Layout(NamedTuple):
    """Where everything is, in pixels.

    Attributes:
        size: (width, height) of the picture.
        width: of a panel, as all columns are as wide as the first.
        lefts: of the columns.
        tops: of the rows; below them those of the captions.
        letters: height of the titles' letters.
    """

    size: tuple[int, int]
    width: int
    lefts: list[int]
    tops: list[int]
    letters: int


def layout(columns: Sequence[Column]) -> Layout:
    """The layout of a picture of at least one column."""
    first = columns[0].panels
    width = round(HEIGHT * first[0].shape[-1] / first[0].shape[-2])
    lefts = [0]
    for before, column in itertools.pairwise(columns):
        gap = _GAP if before.group == column.group else _BETWEEN_GROUPS
        lefts.append(lefts[-1] + width + gap)
    total = lefts[-1] + width
    letters = round(_LETTERS * max(1, total / _WIDE))
    line = letters + 8
    top = line * (2 if any(column.group for column in columns) else 1)
    tops = [top + y * (HEIGHT + _GAP) for y in range(len(first) + 1)]
    lines = max(len(column.caption) for column in columns)
    height = tops[-1] + lines * line - (0 if lines else _GAP)
    return Layout((total, height), width, lefts, tops, letters)


def draw_columns(path: Path, columns: Sequence[Column]) -> None:
    """Draws columns side by side.

    Args:
        path: the PNG to write.
        columns: with as many panels each.
    """
    place = layout(columns)
    canvas = Image.new("RGB", place.size, "white")
    draw = ImageDraw.Draw(canvas)
    line = place.letters + 8
    _draw_groups(draw, columns, place)
    for column, left in zip(columns, place.lefts, strict=True):
        how = Image.Resampling.LANCZOS if column.smooth else Image.Resampling.NEAREST
        _write(draw, column.title, (left, place.tops[0] - line + 2), place)
        for panel, top in zip(column.panels, place.tops, strict=False):
            canvas.paste(_picture(panel).resize((place.width, HEIGHT), how), (left, top))
        for number, text in enumerate(column.caption):
            _write(draw, text, (left, place.tops[-1] + number * line), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _draw_groups(draw: ImageDraw.ImageDraw, columns: Sequence[Column], place: Layout) -> None:
    """Writes the names of groups in bold, each over a rule as wide as its columns."""
    for i, column in enumerate(columns):
        if not column.group or (i and columns[i - 1].group == column.group):
            continue
        members = 1
        while i + members < len(columns) and columns[i + members].group == column.group:
            members += 1
        left, right = place.lefts[i], place.lefts[i + members - 1] + place.width
        text = picture_text(column.group)
        font = _font(draw, text, right - left, place.letters, bold=True)
        draw.text((left, 2), text, fill="black", font=font)
        rule = place.letters + 7
        draw.line((left, rule, right - 1, rule), fill="black", width=1)


def _write(draw: ImageDraw.ImageDraw, text: str, at: tuple[int, int], place: Layout) -> None:
    text = picture_text(text)
    draw.text(at, text, fill="black", font=_font(draw, text, place.width, place.letters))


def _picture(panel: Tensor) -> Image.Image:
    pixels = panel.detach().float().cpu().clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(pixels.round().numpy().astype(np.uint8))


def _font(
    draw: ImageDraw.ImageDraw, text: str, width: int, largest: int, bold: bool = False
) -> ImageFont.FreeTypeFont:
    """The largest font in which a text fits its column."""
    file = _font_file(bold)
    for size in range(largest, _SMALLEST, -1):
        font = ImageFont.truetype(file, size)
        if draw.textlength(text, font=font) <= width:
            return font
    return ImageFont.truetype(file, _SMALLEST)


def _font_file(bold: bool) -> str:
    from matplotlib import font_manager  # it ships DejaVu; slow to import

    return font_manager.findfont(f"DejaVu Sans{':bold' if bold else ''}")
