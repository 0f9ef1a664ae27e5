"""Pictures of predicted labels beside the true ones."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.labelled.files import IGNORED
from distill.display.columns import HEIGHT
from distill.display.text import picture_text

_GAP, _LINE = 6, 18
_GOLDEN = 0.618034  # of the circle of hues: consecutive classes differ much in colour


def label_colours(count: int) -> Tensor:
    """A colour for each class, uint8 (256, 3); black for ignored pixels."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    for number in range(min(count, IGNORED)):
        value = (1.0, 0.75, 0.5)[number % 3]
        rgb = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.85, value)
        table[number] = torch.tensor([round(255 * c) for c in rgb])
    return table


def draw_labels(
    path: Path, rows: Sequence[tuple[Tensor, Tensor, Tensor]], names: Sequence[str]
) -> None:
    """Draws a row of image, labels and prediction for each image, and a legend of the colours.

    Args:
        path: the PNG to write.
        rows: images (3, H, W) in [0, 1], labels (H, W) and predictions (H, W).
        names: of the classes; those that occur are listed.
    """
    table = label_colours(len(names))
    widths = [round(HEIGHT * image.shape[-1] / image.shape[-2]) for image, _, _ in rows]
    seen = sorted({int(v) for _, a, b in rows for v in (*a.unique(), *b.unique())} - {IGNORED})
    font = ImageFont.load_default(12)
    width = 3 * max(widths) + 2 * _GAP
    per_row = max(1, width // 150)
    legend = _LINE * -(-len(seen) // per_row)
    height = len(rows) * (HEIGHT + _GAP) + legend
    sheet = Image.new("RGB", (width, height), "white")
    for y, (image, labels, predicted) in enumerate(rows):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        panels = [pixels, table[labels.long()], table[predicted.long()]]
        for x, panel in enumerate(panels):
            how = Image.Resampling.LANCZOS if x == 0 else Image.Resampling.NEAREST
            picture = Image.fromarray(panel.numpy()).resize((widths[y], HEIGHT), how)
            sheet.paste(picture, (x * (max(widths) + _GAP), y * (HEIGHT + _GAP)))
    draw = ImageDraw.Draw(sheet)
    for place, number in enumerate(seen):
        left, top = place % per_row * 150, height - legend + place // per_row * _LINE
        draw.rectangle((left, top + 3, left + 12, top + 15), fill=tuple(table[number].tolist()))
        draw.text((left + 17, top + 2), picture_text(names[number], 20), fill="black", font=font)
    sheet.save(path)
