"""Readers of single files of depth sets: depth and normals; and windows of images."""

from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from data.errors import DataError


class Window(BaseModel):
    """A rectangle of an image, as rows and columns (first, one after the last)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[NonNegativeInt, PositiveInt]
    columns: tuple[NonNegativeInt, PositiveInt]

    @model_validator(mode="after")
    def _holds_pixels(self) -> Self:
        for name in ("rows", "columns"):
            first, end = getattr(self, name)
            if first >= end:
                raise ValueError(
                    f"{name}: expected [first, end] with first < end, got [{first}, {end}]"
                )
        return self

    def slices(self, height: int, width: int, name: str) -> tuple[slice, slice]:
        """The rows and columns of an image of (height, width) pixels.

        Raises:
            DataError: the image is smaller; the message has its name.
        """
        if self.rows[1] > height or self.columns[1] > width:
            raise DataError(
                f"'{name}' has {height} x {width} px, too few for the window of rows "
                f"{list(self.rows)} and columns {list(self.columns)}"
            )
        return slice(*self.rows), slice(*self.columns)


def read_depth(path: Path, unit: float) -> np.ndarray:
    """Depth in metres, float32 (H, W), 0 where unknown, of a grey PNG (8, 16 bit) or `.npy` (H, W).

    `unit` is the metres of one step of the stored depth.

    Raises:
        DataError: the file cannot be read, or has another shape.
    """
    values = _array(path, "depth")
    if values.ndim != 2:
        raise DataError(f"the depth '{path}': expected shape (H, W), got {values.shape}")
    return np.nan_to_num(values * unit, posinf=0.0, neginf=0.0).astype(np.float32)


def read_normals(path: Path) -> np.ndarray:
    """Unit normals, float32 (H, W, 3), 0 where unknown: where their length is far from one.

    The file is a PNG that maps [-1, 1] to 0 to 255, or a `.npy` (H, W, 3).

    Raises:
        DataError: the file cannot be read, or has another shape.
    """
    values = _array(path, "normals")
    if values.ndim != 3 or values.shape[2] != 3:
        raise DataError(f"the normals '{path}': expected shape (H, W, 3), got {values.shape}")
    vectors = values / 127.5 - 1 if path.suffix == ".png" else values
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    known = (length > 0.5) & (length < 1.5)
    return np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)


def _array(path: Path, what: str) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path).astype(np.float64)
        with Image.open(path) as opened:
            return np.asarray(opened).astype(np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"the {what} '{path}': {error}") from error
