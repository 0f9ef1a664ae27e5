"""load_images: every image of a folder or of shards, at one resolution, always the same."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.images import load_images


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _noise(seed: int) -> bytes:
    return _png(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("b/2.png", "a.png", "b/1.PNG")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_noise(number))
    (tmp_path / "photos/notes.txt").touch()
    return tmp_path / "photos"


def _write_tar(path: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            data = _noise(number)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_a_folder_gives_its_images_sorted_by_name(folder: Path) -> None:
    images, names = load_images(folder, (10, 12))
    assert names == ["a.png", "b/1.PNG", "b/2.png"]
    assert images.shape == (3, 3, 10, 12)
    assert images.dtype == torch.uint8
    assert torch.equal(images, load_images(folder, (10, 12))[0])


def test_shards_archives_and_single_images_can_be_mixed(folder: Path, tmp_path: Path) -> None:
    _write_tar(tmp_path / "shards/001.tar", ["x.png"])
    _write_tar(tmp_path / "shards/000.tar", ["y.png", "x.png"])
    images, names = load_images([tmp_path / "shards", folder / "a.png"], (20, 30))
    assert names == ["000.tar/x.png", "000.tar/y.png", "001.tar/x.png", "a.png"]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(_noise(n)))) for n in (1, 0, 0, 1)])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_the_image_covers_the_output_and_its_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 200  # just the square in the middle
    (tmp_path / "wide.png").write_bytes(_png(pixels))
    (tmp_path / "tall.png").write_bytes(_png(pixels.transpose(1, 0, 2)))
    images, _ = load_images(tmp_path, (20, 20))
    inner = images[..., 2:-2, 2:-2]  # at the border the filter sees what is cropped, as it should
    assert (inner == 200).all()
    images, _ = load_images(tmp_path / "wide.png", (10, 30))
    assert (images[0, :, :, 12:18] == 200).all()
    assert (images[0, :, :, :8] == 0).all()


def test_shrinking_antialiases(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "s.png").write_bytes(_png(stripes))
    images, _ = load_images(tmp_path, (16, 16))
    assert (images.float() - 127.5).abs()[..., 2:-2].max() < 4


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "b/cut.png").write_bytes(_noise(9)[:-500])
    with pytest.raises(DataError, match=r"the image '.*photos/b/cut\.png': not decodable"):
        load_images(folder, (8, 8))
    (folder / "b/cut.png").unlink()
    (folder / "b/gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"photos', b/gone\.png: a broken link"):
        load_images(folder, (8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image \(jpg, jpeg, png, webp\) in .*empty"):
        load_images(tmp_path / "empty", (8, 8))
    with pytest.raises(DataError, match=r"does not exist \(did you mean 'empty'"):
        load_images(tmp_path / "emty", (8, 8))


def test_shards_that_are_still_being_written_are_refused(tmp_path: Path) -> None:
    _write_tar(tmp_path / "shards/000.tar", ["x.png"])
    manifest = {"complete": False, "shards": []}
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="has not finished here"):
        load_images(tmp_path / "shards", (8, 8))


def test_a_folder_of_shards_and_images_is_refused(folder: Path) -> None:
    _write_tar(folder / "000.tar", ["x.png"])
    with pytest.raises(DataError, match=r"holds shards and images \('a\.png'\)"):
        load_images(folder, (8, 8))
