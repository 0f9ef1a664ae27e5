"""One image: every mode and orientation to RGB, refusals on the header, exact crops."""

import io
import random
import struct
import zlib
from typing import Literal, NamedTuple

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from pydantic import ValidationError

from data import decode
from data.config import AugmentationConfig, DataConfig
from data.decode import (
    BadImage,
    Decoder,
    ImageReader,
    centre_box,
    choose_decoder,
    open_image,
    plain_jpeg_size,
    random_box,
)
from data.errors import DataError

H, W = 8, 12


class _Reader(NamedTuple):
    """A reader at one resolution."""

    images: ImageReader
    resolution: tuple[int, int]

    def read(self, data: bytes, rng: random.Random | None = None) -> np.ndarray:
        return self.images.read(data, self.resolution, rng)


def _reader(
    resolution: tuple[int, int] = (H, W),
    augmentation: AugmentationConfig | Literal["none"] = "none",
    *,
    decoder: Decoder = "pil",
    draft: bool = False,
    max_pixels: int = 10**6,
) -> _Reader:
    images = ImageReader(augmentation, decoder=decoder, draft=draft, max_pixels=max_pixels)
    return _Reader(images, resolution)


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # foreign call
    return buffer.getvalue()


def _noise(height: int = H, width: int = W, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _smooth(height: int, width: int, scale: int = 1) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / scale
    waves = [np.sin(x / 9 + c) * np.cos(y / 7 + c) for c in range(3)]
    return np.uint8(127.5 + 120 * np.stack(waves, -1))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# What a camera that notes an orientation has done to the upright scene; EXIF 2.32, table 6.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # shown after a quarter turn clockwise
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_upright_as_its_exif_says(orientation: int) -> None:
    scene = _noise()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](scene)))
    data = _bytes(stored, "PNG", exif=_exif(orientation))
    np.testing.assert_array_equal(_reader().read(data), scene)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("decoder", ["pil", "simplejpeg"])
def test_a_jpeg_is_turned_by_both_decoders(orientation: int, decoder: Decoder) -> None:
    scene = _smooth(32, 48)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](scene)))
    data = _bytes(stored, "JPEG", quality=98, subsampling=0, exif=_exif(orientation))
    read = _reader((32, 48), decoder=decoder).read(data)
    assert np.abs(read.astype(int) - scene).max() < 12


def test_a_crop_of_a_turned_image_is_taken_from_the_upright_scene() -> None:
    scene = np.zeros((30, 10, 3), np.uint8)
    scene[10:20] = 200  # the centre square of the upright image
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](scene)))
    read = _reader((10, 10)).read(_bytes(stored, exif=_exif(6)))
    np.testing.assert_array_equal(read, np.full((10, 10, 3), 200))


def test_damaged_exif_leaves_the_image_readable() -> None:
    data = _bytes(Image.fromarray(_noise()), "JPEG", exif=b"Exif\0\0garbage!garbage")
    assert _reader().read(data).shape == (H, W, 3)


def test_grey_becomes_three_equal_channels() -> None:
    grey = _noise(channels=1)[..., 0]
    expected = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(_reader().read(_bytes(Image.fromarray(grey))), expected)


def test_one_bit_images_become_black_and_white() -> None:
    bits = _noise(channels=1)[..., 0] > 127
    read = _reader().read(_bytes(Image.fromarray(bits)))
    np.testing.assert_array_equal(read, np.repeat(bits[..., None], 3, 2) * np.uint8(255))


def test_cmyk_ink_becomes_the_light_that_it_leaves() -> None:
    for ink, colour in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((0, 0, 0, 128), 127)):
        data = _bytes(Image.new("CMYK", (W, H), ink), "JPEG", quality=100)
        read = _reader(decoder="simplejpeg").read(data)
        assert np.abs(read.astype(int) - colour).max() <= 1
    data = _bytes(Image.new("CMYK", (W, H), (255, 0, 0, 0)), "JPEG", quality=100)
    assert np.abs(_reader().read(data).astype(int) - (0, 255, 255)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(kind: str) -> None:
    pixels = _noise(channels=4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = _bytes(Image.fromarray(pixels, "RGBA"), kind, **options)
    alpha = pixels[..., 3:].astype(float) / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * 255
    assert np.abs(_reader().read(data) - expected).max() <= 1


def test_grey_with_transparency_is_composited_on_white() -> None:
    pixels = _noise(channels=2)
    alpha = pixels[..., 1:].astype(float) / 255
    read = _reader().read(_bytes(Image.fromarray(pixels, "LA")))
    expected = np.repeat(alpha * pixels[..., :1] + (1 - alpha) * 255, 3, 2)
    assert np.abs(read - expected).max() <= 1


def test_a_palette_becomes_its_colours_and_its_transparent_entry_white() -> None:
    indices = _noise(channels=1)[..., 0] % 4
    palette = np.array([(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200)], np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(_reader().read(_bytes(image)), palette[indices])
    palette_on_white = palette.copy()
    palette_on_white[2] = 255
    data = _bytes(image, transparency=2)
    np.testing.assert_array_equal(_reader().read(data), palette_on_white[indices])


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.arange(H * W, dtype=np.uint16).reshape(H, W) * (65535 // (H * W - 1))
    data = _bytes(Image.fromarray(values))
    read = _reader().read(data)
    np.testing.assert_array_equal(read[..., 0], np.floor(values / 256))
    assert read.max() == 255
    values[0, 0], values[0, 1] = 1000, 1001  # the same high byte, only one of them transparent
    read = _reader().read(_bytes(Image.fromarray(values), transparency=1000))
    assert (read[0, 0], read[0, 1]) == (pytest.approx(255), pytest.approx(3))


def _png_of_zeros(width: int, height: int) -> bytes:
    """A black one-bit PNG, made without holding its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        head = struct.pack(">I", len(body)) + kind + body
        return head + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + width // 8) * height), 1)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_169_megapixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = _png_of_zeros(13000, 13000)
    assert len(data) < 200_000
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(
        BadImage, match="13000 x 13000 pixels in the header; max_pixels is 100000000"
    ):
        _reader(max_pixels=100_000_000).read(data)


def test_a_limit_above_pillows_own_which_would_have_no_effect_is_refused() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    largest = 2 * Image.MAX_IMAGE_PIXELS
    config = {"sources": [{"shards": "x"}]}
    assert DataConfig.model_validate({**config, "max_pixels": largest}).max_pixels == largest
    with pytest.raises(ValidationError, match="less than or equal to 178956970"):
        DataConfig.model_validate({**config, "max_pixels": largest + 1})


def test_more_pixels_than_pillow_allows_are_refused() -> None:
    with pytest.raises(BadImage, match="decompression bomb"):
        _reader(max_pixels=10**9).read(_png_of_zeros(20000, 20000))


def test_the_pixel_limit_itself_is_allowed() -> None:
    data = _bytes(Image.fromarray(_noise()))
    assert _reader(max_pixels=H * W).read(data).shape == (H, W, 3)
    with pytest.raises(BadImage, match="12 x 8 pixels"):
        _reader(max_pixels=H * W - 1).read(data)


JPEGS = {
    "420": {"subsampling": 2},
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "progressive": {"progressive": True},
    "turned": {"exif": _exif(6)},
}


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("kind", [*JPEGS, "grey"])
def test_simplejpeg_gives_bitwise_the_pixels_of_pillow(
    kind: str, draft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "to_rgb", _counted := _Counter(decode.to_rgb))
    resolution, how = (24, 36), AugmentationConfig()
    for number in range(12):
        image = Image.fromarray(_noise(101 + 40 * number, 333 - 7 * number, seed=number))
        image = image.convert("L") if kind == "grey" else image
        data = _bytes(image, "JPEG", **JPEGS.get(kind, {}))
        pixels = [
            _reader(resolution, how, decoder=decoder, draft=draft).read(data, random.Random(number))
            for decoder in ("pil", "simplejpeg")
        ]
        np.testing.assert_array_equal(*pixels)
    assert _counted.calls == 12  # Pillow's half; simplejpeg's never fell back on it


@pytest.mark.parametrize("kind", [*JPEGS, "grey", "cmyk", "png"])
def test_a_plain_jpegs_size_is_read_as_pillow_does_and_other_headers_are_left_to_it(
    kind: str,
) -> None:
    image = Image.fromarray(_noise(101, 33))
    mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    data = _bytes(image.convert(mode), "PNG" if kind == "png" else "JPEG", **JPEGS.get(kind, {}))
    known = kind not in ("turned", "cmyk", "png")
    assert plain_jpeg_size(data) == ((33, 101) if known else None)


def test_no_part_of_a_header_has_a_size() -> None:
    data = _bytes(Image.fromarray(_noise()), "JPEG")
    scan = data.index(b"\xff\xda")
    assert {plain_jpeg_size(data[:end]) for end in range(scan + 2)} == {None}


class _Counter:
    def __init__(self, function: object) -> None:
        self._function = function
        self.calls = 0

    def __call__(self, image: Image.Image) -> Image.Image:
        self.calls += 1
        return self._function(image)  # type: ignore[operator]


@pytest.mark.parametrize("decoder", ["pil", "simplejpeg"])
def test_draft_decodes_smaller_only_while_the_crop_covers_the_output(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spy(image: Image.Image, *args: object, **options: object) -> Image.Image:
        sizes.append(image.size)
        return resize(image, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", spy)
    data = _bytes(Image.fromarray(_smooth(161, 241)), "JPEG")
    for resolution in ((161, 241), (81, 121), (80, 120), (41, 60), (40, 60), (20, 30), (8, 12)):
        _reader(resolution, decoder=decoder, draft=True).read(data)
    halves = [(241, 161), (241, 161), (121, 81), (121, 81), (61, 41), (31, 21), (31, 21)]
    assert sizes == halves


def test_draft_changes_the_pixels_of_a_smooth_photograph_little() -> None:
    data = _bytes(Image.fromarray(_smooth(640, 960, 4)), "JPEG", quality=95)
    for orientation in (1, 6):
        turned = _bytes(Image.open(io.BytesIO(data)), "JPEG", exif=_exif(orientation))
        pair = [_reader((40, 64), draft=draft).read(turned) for draft in (False, True)]
        assert np.abs(pair[0].astype(int) - pair[1]).mean() < 2


def test_shrinking_averages_what_it_skips() -> None:
    board = np.uint8(255 * (np.indices((96, 144)).sum(0) % 2))
    read = _reader().read(_bytes(Image.fromarray(board)))
    assert np.abs(read.astype(int) - 127).max() <= 2  # nearest neighbour would be 0 or 255


def test_a_linear_ramp_keeps_its_geometry_when_a_non_square_crop_is_resized() -> None:
    """Cell centres of the output lie at (i + 1/2) scale - 1/2 of the crop; the kernel is even."""
    y, x = np.mgrid[:90, :200]
    ramp = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    read = _reader((9, 18)).read(_bytes(Image.fromarray(ramp)))  # the crop: 90 x 180 from (10, 0)
    inner = np.s_[2:-2, 2:-2]  # elsewhere the image's border cuts the kernel
    np.testing.assert_allclose(
        read[..., 0][inner], np.tile(10 + (np.arange(18) + 0.5) * 10 - 0.5, (9, 1))[inner], atol=0.6
    )
    np.testing.assert_allclose(
        read[..., 1][inner], np.tile((np.arange(9)[:, None] + 0.5) * 10 - 0.5, 18)[inner], atol=0.6
    )


@pytest.mark.parametrize(
    ("height", "width", "aspect", "box"),
    [
        (10, 30, 1.0, (10, 0, 20, 10)),
        (30, 10, 1.0, (0, 10, 10, 20)),
        (10, 30, 3.0, (0, 0, 30, 10)),
        (10, 30, 1.5, (7, 0, 22, 10)),
        (1, 500, 0.5, (249, 0, 250, 1)),
    ],
)
def test_the_centre_crop_is_the_largest_of_its_aspect(
    height: int, width: int, aspect: float, box: tuple[int, int, int, int]
) -> None:
    assert centre_box(height, width, aspect) == box


@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.4])
def test_random_crops_lie_inside_and_have_the_area_and_stretch_asked_for(aspect: float) -> None:
    rng, how = random.Random(0), AugmentationConfig(scale=(0.1, 0.3), ratio=(0.8, 1.25))
    areas, places = [], set()
    for _ in range(400):
        left, top, right, bottom = random_box(600, 800, aspect, how, rng)
        assert 0 <= left < right <= 800
        assert 0 <= top < bottom <= 600
        areas.append((right - left) * (bottom - top) / (600 * 800))
        assert 0.79 < (right - left) / (bottom - top) / aspect < 1.27
        places.add((left, top))
    assert 0.099 < min(areas) < 0.12
    assert 0.28 < max(areas) < 0.301
    assert abs(np.mean(areas) - 0.2) < 0.01  # uniform
    assert len(places) > 390


def test_where_no_random_crop_fits_the_centre_is_taken() -> None:
    how = AugmentationConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert random_box(10, 1000, 1.0, how, random.Random(0)) == centre_box(10, 1000, 1.0)


def test_the_same_generator_gives_the_same_crop_and_flips_as_often_as_asked() -> None:
    scene = np.zeros((H, W, 3), np.uint8)
    scene[:, : W // 2] = 255
    data = _bytes(Image.fromarray(scene))
    whole = AugmentationConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.25)
    reads = [_reader(augmentation=whole).read(data, random.Random(i)) for i in range(200)]
    flipped = sum(bool(read[0, 0, 0] == 0) for read in reads)
    assert 30 < flipped < 70  # 50 expected, standard deviation 6
    for i, read in enumerate(reads[:5]):
        again = _reader(augmentation=whole).read(data, random.Random(i))
        np.testing.assert_array_equal(read, again)


@pytest.mark.parametrize("decoder", ["pil", "simplejpeg"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_bad(kind: str, decoder: Decoder) -> None:
    data = _bytes(Image.fromarray(_noise(64, 64)), kind)
    with pytest.raises(BadImage, match="not decodable|no JPEG"):
        _reader(decoder=decoder).read(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x80\x04K\x01.", b"GIF89a"])
def test_other_bytes_are_bad(data: bytes) -> None:
    with pytest.raises(BadImage, match="not a JPEG, PNG or WebP image"):
        _reader().read(data)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
def test_formats_beside_the_three_are_never_parsed(kind: str) -> None:
    with pytest.raises(BadImage, match="not a JPEG, PNG or WebP image"):
        _reader().read(_bytes(Image.fromarray(_noise()), kind))


def test_the_decoder_is_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert simplejpeg is not None
    assert choose_decoder("auto") == "simplejpeg"
    assert choose_decoder("pil") == "pil"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_decoder("auto") == "pil"
    with pytest.raises(DataError, match="data.decoder: simplejpeg is not installed; `pip install"):
        choose_decoder("simplejpeg")


@pytest.mark.parametrize(
    "head, message",
    [
        (b"\xff\xd8\xff", "^a JPEG image whose head is damaged$"),
        (b"\x89PNG", "^a PNG image whose head is damaged$"),
        (b"<html><body>404", "^not a JPEG, PNG or WebP image but a web page$"),
        (b"hello", "^not a JPEG, PNG or WebP image$"),
    ],
)
def test_what_cannot_be_opened_is_told_by_its_first_bytes(head: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        open_image(head, 100)
