"""Readers of single files of depth sets: depth and normals; and windows of images."""

from pathlib import Path
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from data.content import describe_content
from data.errors import DataError
from data.labelled.files import naming
from data.labelled.pixel_values import read_encoded_normals, read_steps
from data.text import shown

DEPTH_EXTENSIONS = ("png", "npy", "tif", "tiff")  # of depth and of normals
_NPY = b"\x93NUMPY"


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
    """Depth in metres, float32 (H, W), 0 where unknown: stored as 0, negative, or not finite.

    Args:
        path: a grey PNG or TIFF of any number of bits, or a `.npy` of numbers, (H, W), or with one
            channel first or last.
        unit: metres of one step of the stored depth.

    Raises:
        DataError: the file cannot be read, or has another shape or type.
    """
    values = _array(path, "depth")
    if values is None:
        values = read_steps(path)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2:
        raise DataError(f"the depth '{shown(path)}': expected shape (H, W), got {values.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        metres = (values.astype(np.float64) * unit).astype(np.float32)
    return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))


def read_normals(path: Path) -> np.ndarray:
    """Unit normals, float32 (H, W, 3), 0 where unknown: where their length is far from one.

    The file is a PNG or TIFF that maps [-1, 1] to 0 to 255, or a `.npy` (H, W, 3) of vectors.

    Raises:
        DataError: the file cannot be read, or has another shape or type.
    """
    values = _array(path, "normals")
    if values is None:
        vectors = read_encoded_normals(path) / 127.5 - 1
    elif values.ndim != 3 or values.shape[2] != 3:
        raise DataError(
            f"the normals '{shown(path)}': expected shape (H, W, 3), got {values.shape}"
        )
    else:
        vectors = values.astype(np.float64)
        if values.dtype.kind != "f" and np.abs(vectors).max() > 1:
            raise DataError(
                f"the normals '{shown(path)}': expected vectors of length 1, got {values.dtype} up "
                f"to {values.max()}; save them as floats from -1 to 1, or as a PNG"
            )
    vectors = np.where(np.isfinite(vectors), vectors, 0)
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    known = (length > 0.5) & (length < 1.5)
    return np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)


def _array(path: Path, what: str) -> np.ndarray | None:
    """The numbers in a `.npy`; None where the file is none, by its content."""
    with naming(path, what), path.open("rb") as file:
        head = file.read(64)
        if not head.startswith(_NPY):
            if path.suffix.lower() != ".npy":
                return None
            raise DataError(f"the {what} '{shown(path)}': {_no_array(head)}")
        file.seek(0)
        values: np.ndarray = np.load(file, allow_pickle=False)
    if values.dtype.kind not in "iuf":
        kind = "several fields" if values.dtype.names else str(values.dtype)
        raise DataError(f"the {what} '{shown(path)}': expected real numbers, got {kind}")
    if not values.size:
        raise DataError(f"the {what} '{shown(path)}': no values, its shape is {values.shape}")
    return values


def _no_array(head: bytes) -> str:
    if head.startswith(b"PK"):
        return "an `.npz` of several arrays; save the one as `.npy`"
    if head[:1] == b"\x80":
        return "pickled Python objects, which are not read; save an array with numpy.save"
    kind = describe_content(head)
    return f"not a NumPy array{f' but {kind}' if kind else ''}" if head else "an empty file"
