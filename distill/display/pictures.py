"""Draws PCA pictures of feature maps, of teachers and students in common colours.

Separate PCAs of two maps could not be compared, as axes, signs and scales would differ. So the PCA
is fitted to the teacher's map, and the map of a student's head is projected onto the same axes with
the same scaling: equal colours mean equal features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.display.columns import Column, draw_columns
from student.model import StudentOutput
from teachers.features import Features

_TAIL = 0.01  # share of cells that saturate at either end, so that outliers do not set the range

Captions = Mapping[str, Mapping[str, Sequence[str]]]


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
        axes = _principal_axes(cells - mean)
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
    captions: Captions = MappingProxyType({}),
) -> None:
    """Draws a row for each image: the image, and for each teacher its map and those of students.

    Each image has axes of its own, on which its teacher's map shows most. The space does not
    matter: PHI-S is a rotation with one scale, which leaves the picture what it is.

    Args:
        path: the PNG to write.
        images: (B, 3, H, W) in [0, 1].
        targets: teacher name to the targets of its heads, spatial (B, D, h, w).
        outputs: student name to its output for the same images, in the space of the targets.
        captions: lines below a column, by teacher and student.
    """
    columns = [Column("image", images, smooth=True)]
    for teacher, target in targets.items():
        bases = [ColourBasis.fit(each[None]) for each in target.spatial]
        columns.append(Column("teacher", _coloured(bases, target.spatial), teacher))
        for student, output in outputs.items():
            panels = _coloured(bases, output.heads[teacher].spatial)
            lines = captions.get(teacher, {}).get(student, ())
            columns.append(Column(student, panels, teacher, lines))
    draw_columns(path, columns)


def _coloured(bases: Sequence[ColourBasis], maps: Tensor) -> list[Tensor]:
    """Maps (B, D, h, w) in the colours of B bases."""
    return [basis.colours(each[None])[0] for basis, each in zip(bases, maps, strict=True)]


def draw_maps(path: Path, images: Tensor, maps: Mapping[str, Tensor]) -> None:
    """Draws a row for each image: the image, and maps of one feature space in common colours.

    Args:
        path: the PNG to write.
        images: (B, 3, H, W) in [0, 1].
        maps: title to maps (B, D, h, w); h and w may differ. The PCA is fitted to the first.
    """
    basis = ColourBasis.fit(next(iter(maps.values())))
    shown = [Column(title, basis.colours(each)) for title, each in maps.items()]
    draw_columns(path, [Column("image", images, smooth=True), *shown])


def draw_side_by_side(path: Path, maps: Sequence[tuple[str, Tensor]]) -> None:
    """Draws maps of different feature spaces in one row, each with a PCA of its own.

    Args:
        path: the PNG to write.
        maps: titles, which may repeat, and maps (1, D, h, w); drawn as wide as the first.
    """
    draw_columns(path, [Column(title, ColourBasis.fit(m).colours(m)) for title, m in maps])


def _principal_axes(centred: Tensor) -> Tensor:
    """The three principal axes of centred rows (N, D), as columns (D, 3)."""
    count, dim = centred.shape
    if 3 < count < dim:  # of N x N products, which are far fewer where channels are many
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        if values[-3] > 1e-9 * values[-1]:
            return F.normalize(centred.T @ vectors[:, -3:].flip(1), dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -3:].flip(1)


def _cells(maps: Tensor) -> Tensor:
    return maps.detach().double().cpu().permute(0, 2, 3, 1).flatten(0, 2)
