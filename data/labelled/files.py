"""Readers of single files of labelled sets: images, label maps, lists."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.config import MAX_PIXELS
from data.decode import BadImage, open_image, to_rgb
from data.errors import DataError

IGNORED = 255  # label of pixels that neither train nor count


def read_rgb(path: Path) -> np.ndarray:
    """The stored pixels of an image, uint8 (H, W, 3).

    EXIF orientation is not applied, as labels are drawn on the stored pixels.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return np.asarray(to_rgb(open_image(path.read_bytes(), MAX_PIXELS)))
    except (BadImage, OSError) as error:
        raise DataError(f"the image '{path}': {error}") from error


def read_size(path: Path) -> tuple[int, int]:
    """The (height, width) in pixels of an image, from its header; that of `read_rgb`.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Image.open(path) as opened:
            return opened.height, opened.width
    except OSError as error:
        raise DataError(f"the image '{path}': {error}") from error


def read_indices(path: Path) -> np.ndarray:
    """The values of a label map, (H, W): grey levels, or indices of a palette.

    Raises:
        DataError: the file cannot be read, or has colour channels.
    """
    try:
        with Image.open(path) as opened:
            values = np.asarray(opened)
    except OSError as error:
        raise DataError(f"the label map '{path}': {error}") from error
    if values.ndim != 2:
        raise DataError(
            f"the label map '{path}': expected one channel of class numbers, got {values.shape[-1]}"
        )
    return values


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a list, without blank ones.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"the list '{path}' cannot be read ({error.strerror})") from error
