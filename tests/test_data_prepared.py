"""Images made ready for an encoder: what is cut, squashed and kept; odd modes; order and errors."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data.errors import DataError
from data.labelled.prepared import ImagePreparation, PreparationConfig, read_prepared


def ramp(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, by one a pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def preparation(resolution: tuple[int, int], patch_size: int = 1, **how: Any) -> ImagePreparation:
    return ImagePreparation(PreparationConfig(**how), resolution, patch_size)


def test_a_crop_keeps_the_centre() -> None:
    out = preparation((20, 20))(encoded(ramp(20, 60)), "x")
    assert np.array_equal(out, ramp(20, 60)[:, 20:40])


def test_a_crop_keeps_its_share_of_the_largest_box() -> None:
    """DINO's 224 of 256: cutting 28 of 32 px and resizing nothing leaves the pixels."""
    out = preparation((28, 28), crop_ratio=28 / 32)(encoded(ramp(32, 50)), "x")
    assert np.array_equal(out, ramp(32, 50)[2:30, 11:39])


def test_a_squash_keeps_everything_and_no_aspect() -> None:
    out = preparation((10, 10), fit="squash")(encoded(ramp(20, 60)), "x")
    due = np.asarray(Image.fromarray(ramp(20, 60)).resize((10, 10), Image.Resampling.BICUBIC))
    assert np.array_equal(out, due)


@pytest.mark.parametrize(
    "size, due",
    [((30, 60), (16, 32)), ((60, 30), (32, 16)), ((30, 49), (16, 28)), ((9, 9), (16,) * 2)],
)
def test_whole_keeps_the_aspect_up_to_a_patch(size: tuple[int, int], due: tuple[int, int]) -> None:
    prepare = preparation((16, 16), patch_size=4, fit="whole")
    assert prepare.size(*size) == due
    assert prepare(encoded(ramp(*size)), "x").shape == (*due, 3)


def test_shrinking_antialiases() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 200
    out = preparation((4, 4))(encoded(stripes), "x")
    assert abs(out.astype(int)[1:3, 1:3] - 100).max() <= 2


def test_grey_and_palette_images_are_rgb() -> None:
    grey = ramp(8, 8)[..., 0]
    out = preparation((8, 8))(encoded(Image.fromarray(grey, "L")), "x")
    assert np.array_equal(out, np.repeat(grey[..., None], 3, -1))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    out = preparation((1, 2), fit="squash")(encoded(palette), "x")
    assert out.tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_exif_orientation_is_not_applied() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(ramp(8, 8), "JPEG", exif=turned, quality=100, subsampling=0)
    plain = encoded(ramp(8, 8), "JPEG", quality=100, subsampling=0)
    prepare = preparation((8, 8))
    assert np.array_equal(prepare(data, "x"), prepare(plain, "x"))


def test_images_come_in_the_order_of_their_names() -> None:
    data = {f"{i}": encoded(np.full((2, 2, 3), i % 256, np.uint8)) for i in range(300)}
    images = list(read_prepared(list(data), data.__getitem__, preparation((2, 2))))
    assert [int(image[0, 0, 0]) for image in images] == [i % 256 for i in range(300)]


def test_what_is_no_image_is_named() -> None:
    whole = encoded(ramp(40, 40), "JPEG")
    for data in (b"text", whole[: len(whole) // 2]):
        with pytest.raises(DataError, match=r"the image 'a/b.jpg': "):
            list(read_prepared(["a/b.jpg"], lambda _, d=data: d, preparation((8, 8))))  # type: ignore[misc]


def test_a_crop_ratio_without_a_crop_is_refused() -> None:
    with pytest.raises(ValidationError, match="crop_ratio: needs fit 'crop', got fit 'squash'"):
        PreparationConfig(fit="squash", crop_ratio=0.5)
