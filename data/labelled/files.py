"""Readers of single files of labelled sets: images, lists, tables, JSON."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.config import MAX_PIXELS
from data.content import LFS, describe_content
from data.decode import BadImage, open_image, to_rgb
from data.errors import DataError, similar_path
from data.text import shown

IGNORED = 255  # label of pixels that neither train nor count


@contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a reader of a file raises into a DataError with the file's name.

    Pillow's, NumPy's and Python's readers raise exceptions of many types.

    Args:
        path: of the file.
        what: it is, for the message: `image`, `label map`, ...
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        hint = similar_path(path)
        raise DataError(f"the {what} '{shown(path)}': there is no such file{hint}") from error
    except BadImage as error:
        raise DataError(f"the {what} '{shown(path)}': {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the {what} '{shown(path)}': {shown(reason, 500)}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"the {what} '{shown(path)}': {shown(reason, 500)}") from error


def read_rgb(path: Path) -> np.ndarray:
    """The stored pixels of an image, uint8 (H, W, 3).

    EXIF orientation is not applied, as labels are drawn on the stored pixels.

    Raises:
        DataError: the file cannot be read.
    """
    with naming(path, "image"):
        return np.asarray(to_rgb(open_image(path.read_bytes(), MAX_PIXELS)))


def read_size(path: Path) -> tuple[int, int]:
    """The (height, width) in pixels of an image, from its header; that of `read_rgb`.

    Raises:
        DataError: the file cannot be read.
    """
    with naming(path, "image"), path.open("rb") as file:
        opened = open_image(file, MAX_PIXELS)
        return opened.height, opened.width


def read_text(path: Path, what: str) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: the file cannot be read, or is in another encoding.
    """
    with naming(path, what):
        data = path.read_bytes()
        if describe_content(data[:64]) == LFS:
            raise DataError(f"the {what} '{shown(path)}' is {LFS}")
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"the {what} '{shown(path)}' is in UTF-16; save it in UTF-8")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            text = data[: error.start + 1].rpartition(b"\n")[2][-40:].decode("latin-1")
            raise DataError(
                f"the {what} '{shown(path)}', line {line}: not in UTF-8 (it would be "
                f"'{shown(text)}' in Latin-1); save it in UTF-8"
            ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(path, "file"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{shown(path)}' cannot be read as JSON: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a list, without blank ones.

    Raises:
        DataError: the file cannot be read.
    """
    # Not `splitlines`: names may hold separators of other scripts.
    lines = read_text(path, "list").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def read_csv(path: Path) -> list[list[str]]:
    """The rows of a table with commas between its columns, without blank ones.

    Raises:
        DataError: the file cannot be read.
    """
    text = read_text(path, "table")
    with naming(path, "table"):
        return [row for row in csv.reader(io.StringIO(text, newline="")) if row]
