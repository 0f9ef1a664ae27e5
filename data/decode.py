"""Decodes one image file to RGB pixels of a given size.

Pillow is the reference; simplejpeg decodes plain JPEGs faster to the same pixels. EXIF orientation
is applied. Grey, palette and CMYK become RGB, and transparency is composited on white. Of 16-bit
channels the high byte is kept (scaled, not clipped). Colour profiles are ignored.
"""

import importlib.util
import io
import math
import random
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from data.config import AugmentationConfig
from data.content import describe_content
from data.errors import DataError

_FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Decoder = Literal["pil", "simplejpeg"]
Box = tuple[int, int, int, int]
_FRAMES, _SCAN, _APP1, _PADDING = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1, 0xFF  # JPEG markers
_SHRINKS = (1, 2, 4, 8)  # those of Pillow; the others of libjpeg-turbo give other pixels


class BadImage(Exception):
    """The bytes are not a readable image; the message gives the reason."""


def choose_decoder(asked: Literal["auto", "pil", "simplejpeg"]) -> Decoder:
    """The JPEG decoder for a setting of `data.decoder`.

    Raises:
        DataError: simplejpeg is set but not installed.
    """
    installed = importlib.util.find_spec("simplejpeg") is not None
    if asked == "simplejpeg" and not installed:
        raise DataError(
            "data.decoder: simplejpeg is not installed; `pip install simplejpeg`, or set 'pil'"
        )
    return "simplejpeg" if installed and asked != "pil" else "pil"


class ImageReader:
    """Decodes, crops, resizes and flips single images.

    Args:
        augmentation: random crop and flip; "none" covers the output and crops the centre.
        decoder: for plain JPEGs.
        draft: decode JPEGs smaller where the crop stays at least as large as the output.
        max_pixels: larger images are refused by their header, before any pixel is decoded.
    """

    def __init__(
        self,
        augmentation: AugmentationConfig | Literal["none"],
        *,
        decoder: Decoder,
        draft: bool,
        max_pixels: int,
    ) -> None:
        self._augmentation = augmentation
        self._decoder = decoder
        self._draft = draft
        self._max_pixels = max_pixels

    def read(
        self, data: bytes, resolution: tuple[int, int], rng: random.Random | None = None
    ) -> np.ndarray:
        """Decodes one image.

        Args:
            data: bytes of a JPEG, PNG or WebP file.
            resolution: (H, W) of the output in pixels.
            rng: draws crop and flip; required with an augmentation.

        Returns:
            uint8 (H, W, 3), RGB.

        Raises:
            BadImage: the bytes cannot be used.
        """
        try:
            return self._read(data, resolution, rng)
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(str(error)) from error
        except Exception as error:  # Pillow's plugins raise exceptions of many types
            raise BadImage(f"not decodable ({type(error).__name__}: {error})") from error

    def _read(
        self, data: bytes, resolution: tuple[int, int], rng: random.Random | None
    ) -> np.ndarray:
        stored = plain_jpeg_size(data) if self._decoder == "simplejpeg" else None
        image, orientation = None, 1
        if stored is None:
            image = open_image(data, self._max_pixels)
            stored, orientation = image.size, image.getexif().get(ORIENTATION, 1)
        else:
            _refuse_larger(stored, self._max_pixels)
        width, height = stored[::-1] if orientation in TURNED else stored
        box, flip = self._choose(height, width, resolution[1] / resolution[0], rng)
        shrink = _shrink(box, resolution) if self._draft else 1
        pixels = self._pixels(image, stored, data, shrink)
        if orientation in _TRANSPOSE:
            pixels = pixels.transpose(_TRANSPOSE[orientation])
        fw, fh = pixels.width / width, pixels.height / height
        scaled = (box[0] * fw, box[1] * fh, box[2] * fw, box[3] * fh)
        out = pixels.resize(resolution[::-1], Image.Resampling.BICUBIC, box=scaled)
        if flip:
            out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Rows of one channel each, which are copied into a batch faster than interleaved pixels.
        rows = np.frombuffer(out.tobytes("raw", "RGB;L"), np.uint8)
        return rows.reshape(out.height, 3, out.width).transpose(0, 2, 1)

    def _choose(
        self, height: int, width: int, aspect: float, rng: random.Random | None
    ) -> tuple[Box, bool]:
        if self._augmentation == "none":
            return centre_box(height, width, aspect), False
        assert rng is not None
        box = random_box(height, width, aspect, self._augmentation, rng)
        return box, rng.random() < self._augmentation.flip

    def _pixels(
        self, image: Image.Image | None, size: tuple[int, int], data: bytes, shrink: int
    ) -> Image.Image:
        if image is None or (image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")):
            if self._decoder == "simplejpeg":
                fast = _simplejpeg(data, size, shrink)
                if fast is not None:
                    return fast
            image = image or open_image(data, self._max_pixels)
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
        return to_rgb(image)


def _shrink(box: Box, resolution: tuple[int, int]) -> int:
    """The largest factor by which a JPEG can be shrunk with the crop as large as the output."""
    height, width = resolution
    room = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    return max(times for times in _SHRINKS if times <= max(room, 1))


def open_image(data: bytes | BinaryIO, max_pixels: int) -> Image.Image:
    """Opens an image file, its bytes or an open file; reads its header only.

    Raises:
        BadImage: the format is unknown, or the image has more pixels than allowed.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        image = Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        kind = describe_content(file.read(64))
        if kind in ("a JPEG image", "a PNG image"):
            raise BadImage(f"{kind} whose head is damaged") from error
        raise BadImage(
            "not a JPEG, PNG or WebP image" + (f" but {kind}" if kind else "")
        ) from error
    _refuse_larger(image.size, max_pixels)
    return image


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a plain JPEG, read from its header without Pillow (30 times faster).

    Returns None for images that Pillow must read: other formats, CMYK, and those with Exif or XMP,
    which may turn the image.
    """
    at, size = 2, None
    if data[:2] != b"\xff\xd8":
        return None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SCAN:
            return size
        if marker in (_APP1, _PADDING):
            return None
        if marker in _FRAMES and data[at + 4] == 8 and data[at + 9] in (1, 3):
            height, width = (int.from_bytes(data[at + i : at + i + 2]) for i in (5, 7))
            size = width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _refuse_larger(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels in the header; max_pixels is {max_pixels}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes an image of any mode to 8-bit RGB, with transparency composited on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in image.info or "A" in image.mode or "a" in image.mode:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _simplejpeg(data: bytes, size: tuple[int, int], shrink: int) -> Image.Image | None:
    """The same pixels as from Pillow; None where libjpeg warns, so that Pillow decides."""
    import simplejpeg

    width, height = (-(-side // shrink) for side in size)
    try:
        # Four bytes a pixel, as in Pillow's memory, which then only copies them.
        pixels = simplejpeg.decode_jpeg(data, "RGBX", min_height=height, min_width=width)
    except ValueError:
        return None
    decoded = Image.new("RGB", pixels.shape[1::-1], color=None)  # does not initialise its pixels
    decoded.frombytes(pixels, "raw", "RGBX")
    return decoded


def centre_box(height: int, width: int, aspect: float) -> Box:
    """The largest centred crop of an aspect ratio, width / height: (left, top, right, bottom)."""
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    w, h = max(1, w), max(1, h)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_box(
    height: int, width: int, aspect: float, how: AugmentationConfig, rng: random.Random
) -> Box:
    """A random crop with area uniform in `scale` and aspect log-uniform in `ratio`.

    As in torchvision's RandomResizedCrop: ten attempts to fit the crop into the image, then the
    centre crop. Here the aspect is relative to the output's, so that a wide output is not squeezed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*how.scale)
        stretch = math.exp(rng.uniform(math.log(how.ratio[0]), math.log(how.ratio[1])))
        w = round(math.sqrt(area * aspect * stretch))
        h = round(math.sqrt(area / (aspect * stretch)))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return centre_box(height, width, aspect)
