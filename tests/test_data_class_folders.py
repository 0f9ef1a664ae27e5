"""Folders of classes, in a folder or an archive, and what classes are called."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.errors import DataError
from data.labelled.class_folders import ClassFolders, read_class_names

FILES = (
    *("train/b/2.jpg", "train/b/1.jpg", "train/a/3.JPEG", "train/c/images/4.png"),
    *("val/a/5.jpg", "val/b/6.jpg", "val/b/7.jpg"),
)


def picture(format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format)
    return buffer.getvalue()


def write_tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
    return root


def layout(root: Path, **changes: Any) -> ClassFolders:
    return ClassFolders(root=root, **changes)


def test_a_folder_is_a_class_and_classes_are_sorted(tmp_path: Path) -> None:
    with layout(write_tree(tmp_path, *FILES)).open("train") as images:
        assert images.classes == ["a", "b", "c"]
        assert images.names == ["a/3.JPEG", "b/1.jpg", "b/2.jpg", "c/images/4.png"]
        assert images.labels == [0, 1, 1, 2]
        assert images.read("b/1.jpg") == picture()


def test_labels_of_the_test_images_count_in_the_classes_of_train(tmp_path: Path) -> None:
    with layout(write_tree(tmp_path, *FILES)).open("test", ["x", "a", "b"]) as images:
        assert (images.names, images.labels) == (["a/5.jpg", "b/6.jpg", "b/7.jpg"], [1, 2, 2])


def test_a_zip_reads_as_the_folder_in_it(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in FILES:
            archive.writestr(name, picture())
    with layout(path).open("train") as images:
        assert images.names == [f"train/{n}" for n in ("a/3.JPEG", "b/1.jpg", "b/2.jpg")] + [
            "train/c/images/4.png"
        ]
        assert (images.labels, images.classes) == ([0, 1, 1, 2], ["a", "b", "c"])
        assert images.read("train/b/1.jpg") == picture()


def test_fewer_classes_and_shots_are_the_first_by_name(tmp_path: Path) -> None:
    small = layout(write_tree(tmp_path, *FILES), num_classes=2, shots=1)
    with small.open("train") as images:
        assert (images.names, images.labels) == (["a/3.JPEG", "b/1.jpg"], [0, 1])
        classes = images.classes
    with small.open("test", classes) as images:
        assert images.names == ["a/5.jpg", "b/6.jpg", "b/7.jpg"]


def test_another_split_can_be_measured_on(tmp_path: Path) -> None:
    with layout(write_tree(tmp_path, "train/a/1.jpg", "v2/a/2.jpg"), test="v2").open("test") as i:
        assert i.names == ["a/2.jpg"]


@pytest.mark.parametrize(
    "files, message",
    [
        ((), r"there is no .*train; expected under .*\n  train/<class>/\*.jpg\n  val/<class>"),
        (("train/1.jpg",), r"'1.jpg' lies in train itself, not in a class's folder"),
        (("train/a/1.txt",), r"no image in train of "),
    ],
)
def test_another_tree_is_refused_with_the_expected_one(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    write_tree(tmp_path, *files)
    with pytest.raises(DataError, match=message), layout(tmp_path).open("train"):
        pass


def test_a_test_class_without_train_images_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "val/images/2.jpg")
    with (
        pytest.raises(DataError, match="val has a class that train lacks, 'images'"),
        layout(tmp_path).open("test", ["a"]),
    ):
        pass


def test_names_come_from_a_table_of_folders_or_from_plain_lines(tmp_path: Path) -> None:
    table = tmp_path / "classes.tsv"
    table.write_text('wnid\tname\nn2\tfrog, "toad"\nn1\tgoldfish, Carassius auratus\n')
    assert read_class_names(table, ["n1", "n2"]) == ["goldfish", "frog"]
    assert read_class_names(table, ["n2"]) == ["frog"]
    lines = tmp_path / "names.txt"
    lines.write_text("gold fish\n\ntoad, frog\n")
    assert read_class_names(lines, ["n1", "n2"]) == ["gold fish", "toad, frog"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\n", "1 lines and the data 2 classes; expected one line"),
        ("wnid\tname\nn1\tx\nn1\ty\nn2\tz\n", "two rows for the class 'n1'"),
        ("wnid\tname\nn1\tx\n", "no name for the class 'n2'"),
        ("wnid\ttitle\nn1\tx\n", "expected a column 'name', got wnid, title"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "names"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_names(path, ["n1", "n2"])


@pytest.mark.parametrize("text", ["missile\nmissile\n", "wnid\tname\nn1\tcrane\nn2\tcrane, bird\n"])
def test_a_name_of_two_classes_is_a_warning(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "names"
    path.write_text(text)
    assert len(read_class_names(path, ["n1", "n2"])) == 2  # CLIP's names of ImageNet have two such
    assert "1 names belong to several classes" in caplog.text


def test_more_classes_than_there_are_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    with (
        pytest.raises(DataError, match="num_classes: 20, but train of .* has 1 classes"),
        layout(tmp_path, num_classes=20).open("train"),
    ):
        pass


def test_a_folder_around_the_splits_of_an_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("tiny-200/train/a/1.jpg", b"")
    with (
        pytest.raises(DataError, match="there is tiny-200/train/: unpack the archive"),
        layout(tmp_path / "set.zip").open("train"),
    ):
        pass
