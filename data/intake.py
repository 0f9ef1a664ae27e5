"""Checks one image before it goes into a shard: decodes it whole, and shrinks it if too large."""

import hashlib
import io
import sys
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps

from data.config import MAX_PIXELS
from data.decode import ORIENTATION, TURNED, BadImage, open_image, to_rgb

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
Fault = Literal["unreadable", "truncated", "decompression bomb", "duplicate"]


@dataclass(frozen=True)
class Sample:
    """An image that can be written.

    Attributes:
        data: bytes of the file.
        extension: that of its content, whatever its name is.
        height: in pixels as displayed, that is after EXIF orientation.
        width: likewise.
        digest: the first 16 bytes of the SHA-256 of the original file.
    """

    data: bytes
    extension: str
    height: int
    width: int
    digest: bytes


@dataclass(frozen=True)
class LeftOut:
    """An image that is not written, and the reason."""

    fault: Fault
    detail: str


def take_image(data: bytes, *, max_side: int | None, quality: int) -> Sample | LeftOut:
    """Decodes a whole image, with Pillow on every machine, and re-encodes it if it is too large.

    Args:
        data: bytes of a JPEG, PNG or WebP file.
        max_side: largest side in pixels; larger images become JPEGs of that size. None keeps all.
        quality: of those JPEGs, 1 to 100.
    """
    if not data:
        return LeftOut("truncated", "an empty file")
    try:
        image = open_image(data, sys.maxsize)
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} x {image.height}"
            return LeftOut("decompression bomb", f"{size} pixels; at most {MAX_PIXELS} are allowed")
        kind = _EXTENSIONS[str(image.format)]
        turned = image.getexif().get(ORIENTATION, 1) in TURNED
        width, height = image.size[::-1] if turned else image.size
        image.load()
        digest = hashlib.sha256(data).digest()[:16]
        if max_side is None or max(height, width) <= max_side:
            return Sample(data, kind, height, width, digest)
        small = _shrink(image, height, width, max_side)
        return Sample(_jpeg(small, quality), "jpg", small.height, small.width, digest)
    except Image.DecompressionBombError as error:
        return LeftOut("decompression bomb", str(error))
    except Exception as error:  # Pillow's plugins raise exceptions of many types
        detail = str(error) if isinstance(error, BadImage) else f"{type(error).__name__}: {error}"
        return LeftOut("truncated" if _ends_early(data) else "unreadable", detail)


def _ends_early(data: bytes) -> bool:
    """Whether an image that cannot be decoded lacks the end marker of its format."""
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
