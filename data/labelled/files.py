"""Single files of labelled sets: pictures, label maps, lists."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.decode import BadImage, open_image, to_rgb
from data.errors import DataError

IGNORED = 255  # of a label map: pixels that neither train nor count


def read_rgb(path: Path) -> np.ndarray:
    """The pixels of an image, uint8 (H, W, 3), as they lie in the file.

    EXIF orientation is not applied: labels are drawn on the stored pixels.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        image = open_image(path.read_bytes(), DataConfig.model_fields["max_pixels"].default)
        return np.asarray(to_rgb(image))
    except (BadImage, OSError) as error:
        raise DataError(f"the image '{path}': {error}") from error


def read_size(path: Path) -> tuple[int, int]:
    """The (height, width) of an image, from its header, as `read_rgb` gives it.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Image.open(path) as opened:
            return opened.height, opened.width
    except OSError as error:
        raise DataError(f"the image '{path}': {error}") from error


def read_indices(path: Path) -> np.ndarray:
    """The numbers of a label map, (H, W): grey levels, or the indices of a palette.

    Raises:
        DataError: the file cannot be read, or has colours and no palette.
    """
    try:
        with Image.open(path) as opened:
            values = np.asarray(opened)
    except OSError as error:
        raise DataError(f"the label map '{path}': {error}") from error
    if values.ndim != 2:
        raise DataError(
            f"the label map '{path}' has {values.shape[-1]} channels; one is due, of class numbers"
        )
    return values


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not blank, without white space around them.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"the list '{path}' cannot be read ({error.strerror})") from error
