"""Digests of data: what changes them, and what does not."""

import os
import shutil
from pathlib import Path

import pytest

from data.errors import DataError
from data.labelled import digest
from data.labelled.digest import DigestMode, file_facts, record_of, same_data, stamp


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def record(root: Path, mode: DigestMode = "auto", parsed: str = "") -> dict[str, object]:
    return record_of(file_facts(files(root), root), mode, parsed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "labels").mkdir(parents=True)
    for number in range(3):
        (folder / "labels" / f"{number}.png").write_bytes(bytes([number]) * 50)
    return folder


@pytest.mark.parametrize("mode", ["auto", "times", "contents"])
def test_what_nobody_touched_is_the_same(root: Path, mode: DigestMode) -> None:
    assert same_data(record(root, mode), record(root, mode))


@pytest.mark.parametrize("mode", ["auto", "times", "contents"])
def test_a_mended_file_of_the_same_size_is_other_data(root: Path, mode: DigestMode) -> None:
    before, marked = record(root, mode), stamp(file_facts(files(root), root))
    (root / "labels/1.png").write_bytes(b"x" * 50)
    assert not same_data(before, record(root, mode))
    assert marked != stamp(file_facts(files(root), root))


def test_a_file_that_keeps_its_time_is_told_apart_by_contents(root: Path) -> None:
    path = root / "labels/1.png"
    before, times = record(root), path.stat()
    marked = stamp(file_facts(files(root), root))
    path.write_bytes(b"x" * 50)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert before["times"] == record(root)["times"]
    assert not same_data(before, record(root))
    assert marked != stamp(file_facts(files(root), root))  # so that contents are read again


def test_a_copy_elsewhere_has_the_same_contents_and_other_times(root: Path) -> None:
    copy = root.parent / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    assert same_data(record(root), record(copy))
    assert not same_data(record(root, "times"), record(copy, "times"))
    # One of the two has contents only: their times decide.
    assert not same_data(record(root, "times"), record(copy, "contents"))
    assert same_data(record(root, "times"), record(root, "contents"))


@pytest.mark.parametrize("change", ["rename", "add", "remove"])
def test_names_and_numbers_of_files_count(root: Path, change: str) -> None:
    before, path = record(root), root / "labels/0.png"
    if change == "rename":
        path.rename(root / "labels/9.png")
    elif change == "add":
        shutil.copy2(path, root / "labels/9.png")
    else:
        path.unlink()
    assert not same_data(before, record(root))


def test_parsed_annotations_count(root: Path) -> None:
    assert not same_data(record(root, parsed="one"), record(root, parsed="two"))
    assert not same_data(record(root, "times", "one"), record(root, "times", "two"))


def test_large_sets_are_not_read_unless_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "CONTENTS_BYTES", 149)
    assert record(root)["contents"] is None
    assert record(root, "contents")["contents"] is not None


def test_a_file_that_cannot_be_looked_at_is_a_message(root: Path) -> None:
    with pytest.raises(DataError, match="gone.png' cannot be read .No such file"):
        file_facts([root / "gone.png"], root)


def test_a_name_of_any_bytes_has_a_digest(root: Path) -> None:
    before = record(root)
    (root / "labels" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    assert not same_data(before, record(root))
