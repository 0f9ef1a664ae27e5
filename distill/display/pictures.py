"""Draws PCA pictures of feature maps, of teachers and students in common colours.

Separate PCAs of two maps could not be compared, as axes, signs and scales would differ. So the PCA
is fitted to the teacher's map, and the map of a student's head is projected onto the same axes with
the same scaling: equal colours mean equal features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.display.text import picture_text
from student.model import StudentOutput
from teachers.features import Features

HEIGHT = 192  # pixels of a panel
_TITLE, _GAP = 22, 6
_TAIL = 0.01  # share of cells that saturate at either end, so that outliers do not set the range

Panels = Tensor | Sequence[Tensor]  # (B, 3, h, w), or pictures of several sizes


class ColourBasis(NamedTuple):
    """Three principal axes of a map, and the range of projections that is mapped to [0, 1].

    All tensors are float64.

    Attributes:
        mean: (D,) mean of the cells.
        axes: (D, 3), orthonormal columns, by decreasing variance.
        low: (3,) projections that are mapped to 0.
        high: (3,) projections that are mapped to 1.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, maps: Tensor) -> Self:
        """Fits the basis to all cells of maps (B, D, h, w), D at least 3."""
        cells = _cells(maps)
        mean = cells.mean(0)
        _, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean))
        axes = vectors[:, -3:].flip(1)
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        axes = axes * largest.sign()  # the sign of an eigenvector is arbitrary
        ends = torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)
        low, high = ((cells - mean) @ axes).quantile(ends, dim=0)
        return cls(mean, axes, low, high)

    def colours(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) as RGB, (B, 3, h, w) in [0, 1]."""
        projected = (_cells(maps) - self.mean) @ self.axes
        span = (self.high - self.low).clamp(min=1e-12)
        colours = ((projected - self.low) / span).clamp(0, 1)
        batch, _, height, width = maps.shape
        return colours.reshape(batch, height, width, 3).permute(0, 3, 1, 2)


def draw_panels(
    path: Path,
    images: Tensor,
    targets: Mapping[str, Features],
    outputs: Mapping[str, StudentOutput],
) -> None:
    """Draws a row for each image: the image, and for each teacher its map and those of students.

    Args:
        path: the PNG to write.
        images: (B, 3, H, W) in [0, 1].
        targets: teacher name to the targets of its heads, spatial (B, D, h, w).
        outputs: student name to its output for the same images.
    """
    columns = {"image": images}
    for teacher, target in targets.items():
        basis = ColourBasis.fit(target.spatial)
        columns[teacher] = basis.colours(target.spatial)
        for student, output in outputs.items():
            columns[f"{student}: {teacher}"] = basis.colours(output.heads[teacher].spatial)
    draw_columns(path, columns)


def draw_maps(path: Path, images: Tensor, maps: Mapping[str, Tensor]) -> None:
    """Draws a row for each image: the image, and maps of one feature space in common colours.

    Args:
        path: the PNG to write.
        images: (B, 3, H, W) in [0, 1].
        maps: title to maps (B, D, h, w); h and w may differ. The PCA is fitted to the first.
    """
    basis = ColourBasis.fit(next(iter(maps.values())))
    draw_columns(path, {"image": images, **{t: basis.colours(m) for t, m in maps.items()}})


def draw_side_by_side(path: Path, maps: Sequence[tuple[str, Tensor]]) -> None:
    """Draws maps of different feature spaces in one row, each with a PCA of its own.

    Args:
        path: the PNG to write.
        maps: titles, which may repeat, and maps (1, D, h, w); drawn as wide as the first.
    """
    draw_columns(path, [(title, ColourBasis.fit(m).colours(m)) for title, m in maps])


def draw_columns(path: Path, titled: Mapping[str, Panels] | Sequence[tuple[str, Panels]]) -> None:
    """Draws columns of pictures with titles, all as wide as the first.

    Args:
        path: the PNG to write.
        titled: title to pictures (3, h, w) in [0, 1]; the title `image` is for photographs.
    """
    columns = list(titled.items()) if isinstance(titled, Mapping) else titled
    first = columns[0][1]
    width = round(HEIGHT * first[0].shape[-1] / first[0].shape[-2])
    step_x, step_y = width + _GAP, HEIGHT + _GAP
    size = (len(columns) * step_x - _GAP, _TITLE + len(first) * step_y - _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for x, (title, panels) in enumerate(columns):
        text = picture_text(title)
        font = _font(draw, text, width)
        draw.text((x * step_x, 2), text, fill="black", font=font)
        for y, panel in enumerate(panels):
            # Cells of maps stay visible as squares: interpolation would invent detail.
            how = Image.Resampling.LANCZOS if title == "image" else Image.Resampling.NEAREST
            picture = _picture(panel).resize((width, HEIGHT), how)
            canvas.paste(picture, (x * step_x, _TITLE + y * step_y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _cells(maps: Tensor) -> Tensor:
    return maps.detach().double().cpu().permute(0, 2, 3, 1).flatten(0, 2)


def _picture(panel: Tensor) -> Image.Image:
    pixels = panel.detach().float().cpu().clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(pixels.round().numpy().astype(np.uint8))


def _font(draw: ImageDraw.ImageDraw, title: str, width: int) -> ImageFont.FreeTypeFont:
    """The largest font of 8 to 14 px in which the title fits its column."""
    for size in range(14, 8, -1):
        font = ImageFont.truetype(_font_file(), size)
        if draw.textlength(title, font=font) <= width:
            return font
    return ImageFont.truetype(_font_file(), 8)


def _font_file() -> str:
    from matplotlib import font_manager  # it ships DejaVu; slow to import

    return font_manager.findfont("DejaVu Sans")
