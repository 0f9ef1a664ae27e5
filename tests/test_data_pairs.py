"""Readers of one thing that must agree: what shards take and training reads, decoders, archives."""

import io
import random
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import MAX_PIXELS, AugmentationConfig
from data.decode import BadImage, ImageReader
from data.errors import DataError
from data.images import load_images
from data.intake import LeftOut, take_image
from data.labelled.class_folders import ClassFolders
from data.labelled.files import read_rgb
from data.labelled.prepared import ImagePreparation, PreparationConfig

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(PHOTO, "JPEG", exif=exif)


def moving(format: str) -> bytes:
    return saved(PHOTO, format, save_all=True, append_images=[PHOTO.rotate(180)])


JPEG, PNG, WEBP = (saved(PHOTO, kind) for kind in ("JPEG", "PNG", "WEBP"))


def no_size() -> bytes:
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + bytes(4) + JPEG[at + 9 :]


def claimed(width: int, height: int) -> bytes:
    """A PNG whose header claims another size."""
    whole = bytearray(PNG)
    whole[16:24] = struct.pack(">II", width, height)
    return bytes(whole)


FILES = {
    "JPEG": JPEG,
    "progressive": saved(PHOTO, "JPEG", progressive=True),
    "grey": saved(PHOTO.convert("L"), "JPEG"),
    "CMYK": saved(PHOTO.convert("CMYK"), "JPEG"),
    "RGB without change": saved(PHOTO, "JPEG", keep_rgb=True),
    "no subsampling": saved(PHOTO, "JPEG", subsampling=0),
    "rubbish behind": JPEG + b"rubbish" * 99,
    "rubbish in front": b"x" + JPEG,
    "fill bytes": JPEG[:2] + b"\xff" * 3 + JPEG[2:],
    "a JPEG in half": JPEG[: len(JPEG) // 2],
    "a JPEG without its end": JPEG[:-2],
    "a progressive JPEG in half": saved(PHOTO, "JPEG", progressive=True)[:900],
    "a header alone": JPEG[: JPEG.index(b"\xff\xda")],
    "a JPEG of no size": no_size(),
    "two JPEGs": JPEG + JPEG,
    **{f"orientation {n}": turned(n) for n in range(10)},
    "PNG": PNG,
    "PNG of 16 bits": saved(Image.fromarray(np.zeros((20, 30), np.uint16)), "PNG"),
    "palette": saved(PHOTO.convert("P"), "PNG"),
    "transparent": saved(PHOTO.convert("RGBA"), "PNG"),
    "one bit": saved(PHOTO.convert("1"), "PNG"),
    "a PNG in half": PNG[: len(PNG) // 2],
    "a PNG without its end": PNG[:-12],
    "a wrong checksum": PNG.replace(b"IHDR", b"IHDR", 1)[:-20] + b"\0" + PNG[-19:],
    "a PNG of no size": claimed(0, 20),
    "a PNG larger than its data": claimed(30, 4000),
    "a PNG of too many pixels": claimed(30_000, 30_000),
    "moving PNG": moving("PNG"),
    "WebP": WEBP,
    "a lossless WebP": saved(PHOTO, "WEBP", lossless=True),
    "moving WebP": moving("WEBP"),
    "a WebP in half": WEBP[: len(WEBP) // 2],
    "one pixel": saved(PHOTO.resize((1, 1)), "PNG"),
    "a line": saved(PHOTO.resize((2000, 1)), "PNG"),
    "GIF": saved(PHOTO, "GIF"),
    "empty": b"",
    "text": b"<html>not found</html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
}


def reader(decoder: Any) -> ImageReader:
    return ImageReader("none", decoder=decoder, draft=False, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("name", FILES)
def test_what_goes_into_a_shard_is_what_training_can_read(tmp_path: Path, name: str) -> None:
    """Through intake, both decoders, labelled sets, preparation, and images of evaluation."""
    taken = take_image(FILES[name], max_side=None, quality=95)
    (tmp_path / "a.jpg").write_bytes(FILES[name])
    prepare = ImagePreparation(PreparationConfig(), (8, 8), 1)
    if isinstance(taken, LeftOut):
        for decoder in ("pil", "simplejpeg"):
            with pytest.raises(BadImage):
                reader(decoder).read(FILES[name], (8, 8))
        for read in (
            lambda: read_rgb(tmp_path / "a.jpg"),
            lambda: prepare(FILES[name], "a.jpg"),
            lambda: load_images(tmp_path, (8, 8)),
        ):
            with pytest.raises(DataError, match=r"a\.jpg"):
                read()
        return
    size = (taken.height, taken.width)
    pixels = reader("pil").read(FILES[name], size)
    np.testing.assert_array_equal(reader("simplejpeg").read(FILES[name], size), pixels)
    np.testing.assert_array_equal(load_images(tmp_path, size)[0][0].permute(1, 2, 0), pixels)
    stored = read_rgb(tmp_path / "a.jpg")
    assert sorted(stored.shape[:2]) == sorted(size)
    if not name.startswith("orientation"):
        np.testing.assert_array_equal(stored, pixels)
    prepare(FILES[name], "a.jpg")
    for seed in range(3):
        crops = [
            ImageReader(AugmentationConfig(), decoder=d, draft=False, max_pixels=MAX_PIXELS).read(
                FILES[name], (8, 8), random.Random(seed)
            )
            for d in ("pil", "simplejpeg")
        ]
        np.testing.assert_array_equal(*crops)


MEMBERS = {
    "train/cat/1.JPG": JPEG,
    "train/cat/v1.0.jpeg": saved(PHOTO.rotate(90), "JPEG"),
    "train/dog/größe.webp": WEBP,
    "train/dog/猫.png": PNG,
    "train/cat/note.txt": b"x",
    "train/.cache/x.jpg": JPEG,
}


def test_a_folder_a_zip_and_a_tar_give_the_same_images(tmp_path: Path) -> None:
    for name, data in MEMBERS.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"set{kind}.tar", "w", format=kind) as tar:
            for name, data in MEMBERS.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = []
    for root in ("set", "set.zip", "set1.tar", "set2.tar"):
        with ClassFolders(root=tmp_path / root).open("train") as images:
            names = [name.removeprefix("train/") for name in images.names]
            data = [images.read(name) for name in images.names]
            found.append((names, images.labels, images.classes, data))
    assert found[0][0] == ["cat/1.JPG", "cat/v1.0.jpeg", "dog/größe.webp", "dog/猫.png"]
    assert all(each == found[0] for each in found)


def test_links_and_secrets_of_archives_are_named_before_they_are_read(tmp_path: Path) -> None:
    """A zip and a tar of a link give no image, and say the same."""
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    secret = zipfile.ZipInfo("a.jpg")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(secret, JPEG)
    raw = bytearray((tmp_path / "b.zip").read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(raw)
    reason = "a link or special file inside the archive"
    for name, due in (("a.zip", reason), ("a.tar", reason), ("b.zip", "encrypted with a passw")):
        with pytest.raises(DataError, match=f"{name}', a.jpg: {due}"):
            load_images(tmp_path / name, (8, 8))
