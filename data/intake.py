"""What becomes of one image on its way into a shard: proved whole, perhaps made smaller."""

import hashlib
import io
import sys
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps

from data.config import DataConfig
from data.decode import BadImage, open_image, to_rgb

MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_ORIENTATION = 0x0112
Fault = Literal["unreadable", "truncated", "decompression bomb", "duplicate"]


@dataclass(frozen=True)
class Sample:
    """An image that may be written.

    Attributes:
        data: the file.
        extension: by content, not by name.
        height: as displayed, that is after EXIF orientation.
        width: likewise.
        digest: the first 16 bytes of the SHA-256 of the file that came.
    """

    data: bytes
    extension: str
    height: int
    width: int
    digest: bytes


@dataclass(frozen=True)
class LeftOut:
    """An image that is not written, and why."""

    fault: Fault
    detail: str


def take_image(data: bytes, *, max_side: int | None, quality: int) -> Sample | LeftOut:
    """Decodes an image whole, by Pillow on every machine, and re-encodes it where it is too large.

    Args:
        data: a JPEG, PNG or WebP file.
        max_side: longer side that is allowed; larger images become JPEGs of that size. None keeps
            the bytes of every image.
        quality: of those JPEGs.
    """
    if not data:
        return LeftOut("truncated", "an empty file")
    try:
        image = open_image(data, sys.maxsize)
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} x {image.height}"
            return LeftOut("decompression bomb", f"{size} pixels; {MAX_PIXELS} are allowed")
        kind = _EXTENSIONS[str(image.format)]
        turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
        width, height = image.size[::-1] if turned else image.size
        image.load()
        digest = hashlib.sha256(data).digest()[:16]
        if max_side is None or max(height, width) <= max_side:
            return Sample(data, kind, height, width, digest)
        small = _shrink(image, height, width, max_side)
        return Sample(_jpeg(small, quality), "jpg", small.height, small.width, digest)
    except Image.DecompressionBombError as error:
        return LeftOut("decompression bomb", str(error))
    except Exception as error:  # Pillow's plugins raise what their parsers happen to raise
        detail = str(error) if isinstance(error, BadImage) else f"{type(error).__name__}: {error}"
        return LeftOut("truncated" if _ends_early(data) else "unreadable", detail)


def _ends_early(data: bytes) -> bool:
    """Whether an image that cannot be decoded lacks the end that its format prescribes."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]  # some cameras pad
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    return data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _shrink(image: Image.Image, height: int, width: int, max_side: int) -> Image.Image:
    rgb = to_rgb(ImageOps.exif_transpose(image))
    scale = max_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return rgb.resize(size, Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
