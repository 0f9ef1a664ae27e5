"""Files appear whole, under their names, and with the mode of any new file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.files import atomic, atomic_folder, write_text
from data.index import load_index
from distill.targets.target_cache import CacheWriter, ViewKey
from distill.targets.target_statistics import TargetStatistics, save_statistics
from student.storage import save_student
from teachers.features import Features
from tests.tiny_export import build, statistics
from tests.tiny_run import write_images


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_has_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    """safetensors writes for the owner only, and mkdtemp makes such folders."""
    student = build()
    path = tmp_path / "student.safetensors"
    save_student(path, student.config, student.targets, student.state_dict(), {})
    each = TargetStatistics(statistics("clip"), torch.ones(()))
    save_statistics(tmp_path / "statistics/clip.safetensors", each, "x")
    writer = CacheWriter(tmp_path / "cache", "fp16", 0)
    writer.add("group", [ViewKey("a", 1)], Features(None, torch.ones(1, 3, 2, 2)))
    writer.finish()
    write_text(tmp_path / "a.txt", "x")
    for found in tmp_path.rglob("*"):
        expected = (0o777 if found.is_dir() else 0o666) & ~umask
        assert found.stat().st_mode & 0o777 == expected, found


def test_an_index_is_readable_by_whom_the_umask_allows(umask: int, tmp_path: Path) -> None:
    from data.write_shards import main as write_shards

    write_images(tmp_path / "images", count=2, size=(8, 8))
    assert write_shards([str(tmp_path / "images"), str(tmp_path / "shards")]) == 0
    shard = next((tmp_path / "shards").glob("*.tar"))
    load_index([str(shard)], ["x"], max_bad_share=0.0, directory=tmp_path / "index")
    for found in tmp_path.rglob("*"):
        expected = (0o777 if found.is_dir() else 0o666) & ~umask
        assert found.stat().st_mode & 0o777 == expected, found


def test_a_file_that_is_replaced_keeps_no_mode_of_its_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for _ in range(2):
        with atomic(path) as partial:
            save_file({"x": torch.ones(1)}, partial)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_a_folder_takes_the_place_of_another_only_if_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"

    def fail() -> None:
        with atomic_folder(folder) as partial:
            (partial / "a").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with atomic_folder(folder) as partial:
            (partial / text).write_text(text)
            assert folder.exists() == (text == "two")
        assert [each.name for each in folder.iterdir()] == [text]
    with pytest.raises(KeyError):
        fail()
    assert [each.name for each in tmp_path.rglob("*")] == ["folder", "two"]

    def no_space(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("data.files.publish", no_space)
    with pytest.raises(OSError, match="no space"), atomic_folder(folder):
        pass
    assert [each.name for each in tmp_path.rglob("*")] == ["folder", "two"]
