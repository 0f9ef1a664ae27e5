"""Values of pixels as stored: numbers of classes, colours, grey levels, steps of depth.

Unlike photographs, these files must come without any loss or conversion: PNG or TIFF, one page,
and the samples themselves. Pillow scales grey of 2 and 4 bits to 8, which is undone here; what it
changes in other ways is refused by the name of its mode.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.config import MAX_PIXELS
from data.content import describe_content
from data.decode import ORIENTATION
from data.errors import DataError
from data.labelled.files import naming
from data.text import shown

_FORMATS = ("PNG", "TIFF")
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_SCALED = {"L;2": 85, "L;4": 17, "L;2R": 85, "L;4R": 17}  # Pillow's raw modes of few bits
_SAMPLE_FORMAT = 339  # the TIFF tag
_COLOURS = ("1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX")


def read_indices(path: Path) -> np.ndarray:
    """The values of a label map, (H, W) of integers: grey levels, or indices of a palette.

    Grey that is stored in three equal channels is read as one.

    Raises:
        DataError: the file cannot be read, has colours or transparency, or is no PNG or TIFF.
    """
    values = _numbers(path, "label map", "class numbers")
    if values.dtype.kind != "f":
        return values
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    if not whole or np.abs(values).max(initial=0) > np.iinfo(np.int32).max:
        raise DataError(f"the label map '{shown(path)}': expected whole numbers, got fractions")
    return values.astype(np.int64)


def read_steps(path: Path, what: str = "depth") -> np.ndarray:
    """The stored numbers of a depth map in an image file, (H, W), of its own type.

    Raises:
        DataError: the file cannot be read, has no grey levels, or is no PNG or TIFF.
    """
    with _opened(path, what) as image:
        if image.mode in ("1", "P", "PA"):
            colours = "one bit" if image.mode == "1" else "a palette of colours"
            raise DataError(
                f"the {what} '{shown(path)}': expected grey levels of {what}, got {colours} "
                f"(mode {image.mode})"
            )
    return _numbers(path, what, what)


def read_colours(path: Path) -> np.ndarray:
    """The colours of a label map, uint8 (H, W, 3), whatever their transparency.

    Raises:
        DataError: the file cannot be read, has no colours of 8 bits, or is no PNG or TIFF.
    """
    return _colours(path, "label map", _COLOURS)


def read_encoded_normals(path: Path) -> np.ndarray:
    """Normals as colours, uint8 (H, W, 3); of 16 bits the upper 8, of which Pillow drops the rest.

    Raises:
        DataError: the file cannot be read, has no three channels, or is no PNG or TIFF.
    """
    return _colours(path, "normals", ("RGB", "RGBA", "RGBX"))


def _colours(path: Path, what: str, modes: Collection[str]) -> np.ndarray:
    with _opened(path, what) as image:
        if image.mode not in modes or ("16" in _raw_mode(image) and modes is _COLOURS):
            raise _refused(path, what, "RGB colours of 8 bits", image)
        image.info.pop("transparency", None)
        if image.mode in ("LA", "RGBA", "RGBX"):  # `convert` keeps the colours below the layer
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


def read_levels(path: Path, what: str = "map") -> np.ndarray:
    """The grey levels of a picture, uint8 (H, W), black 0 and white 255, whatever its mode.

    Raises:
        DataError: the file cannot be read, has colours, or is no PNG or TIFF.
    """
    with _opened(path, what) as image:
        if image.mode.startswith("I;16"):
            return (np.asarray(image) >> 8).astype(np.uint8)
    colours = _colours(path, what, _COLOURS)
    if (colours != colours[..., :1]).any():
        raise DataError(f"the {what} '{shown(path)}': expected grey levels, got colours")
    return colours[..., 0]


def _numbers(path: Path, what: str, of: str) -> np.ndarray:
    with _opened(path, what) as image:
        raw = _raw_mode(image)
        if image.mode in _ONE_CHANNEL:
            values = np.asarray(image)
            if image.mode == "1":
                values = values.astype(np.uint8)
            if raw in _SCALED:
                values = values // np.uint8(_SCALED[raw])
            return values.astype(values.dtype.newbyteorder("="), copy=False)
        if image.mode not in ("LA", "PA", "RGB", "RGBA", "RGBX") or "16" in raw:
            raise _refused(path, what, f"one channel of {of}", image)
        values = np.asarray(image)
        colours = 1 if image.mode in ("LA", "PA") else 3
        if (values[..., :colours] != values[..., :1]).any():
            raise _refused(path, what, f"one channel of {of}", image)
        if image.mode in ("LA", "PA", "RGBA") and (values[..., -1] != 255).any():
            raise DataError(
                f"the {what} '{shown(path)}': parts are transparent (mode {image.mode}); save it "
                "without transparency"
            )
        return values[..., 0]


def _refused(path: Path, what: str, expected: str, image: Image.Image) -> DataError:
    bits = " of 16 bits" if "16" in _raw_mode(image) else ""
    return DataError(
        f"the {what} '{shown(path)}': expected {expected}, got {len(image.getbands())} "
        f"(mode {image.mode}{bits})"
    )


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    with naming(path, what), path.open("rb") as file:
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.UnidentifiedImageError as error:
            file.seek(0)
            kind = describe_content(file.read(64))
            lossy = ", which changes values" if kind == "a JPEG image" else ""
            if kind in ("a PNG image", "a TIFF image"):
                raise DataError(f"the {what} '{shown(path)}': {kind} that is damaged") from error
            but = f" but {kind}{lossy}" if kind else ""
            raise DataError(f"the {what} '{shown(path)}': not a PNG or TIFF{but}") from error
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"the {what} '{shown(path)}': {image.width} x {image.height} pixels; at most "
                f"{MAX_PIXELS} are allowed"
            )
        pages: int = getattr(image, "n_frames", 1)
        if pages > 1:
            raise DataError(f"the {what} '{shown(path)}': {pages} pages or frames, expected one")
        _refuse_changed(image, path, what)
        yield image


def _refuse_changed(image: Image.Image, path: Path, what: str) -> None:
    """Refuses files whose stored values Pillow cannot give: turned round, scaled, compressed."""
    raw, reason = _raw_mode(image), None
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
            reason = "JPEG compression, which changes values"
        elif "I" in raw.partition(";")[2].lstrip("0123456789"):
            reason = "a TIFF in which 0 is white; save it with 0 as black"
        elif image.mode == "L" and tuple(tags.get(_SAMPLE_FORMAT, (1,))) == (2,):
            reason = "a TIFF of 8 bits with a sign; save it without"
        elif tags.get(ORIENTATION, 1) != 1:
            reason = "a TIFF with an orientation; save it upright"
    if raw.startswith(("RGBa", "La")):
        reason = "colours multiplied by their transparency; save it without transparency"
    if reason is not None:
        raise DataError(f"the {what} '{shown(path)}': {reason}")


def _raw_mode(image: Image.Image) -> str:
    """The mode of the stored samples; ask before they are loaded."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)
