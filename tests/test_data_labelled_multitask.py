"""The multi-task layouts, on trees of exactly their form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from scipy.io import savemat

from data.errors import DataError
from data.labelled.multitask import (
    MultiTaskLayout,
    NyudLayout,
    PascalContextLayout,
    decode_normals,
)
from data.labelled.pascal_context import PART_CLASSES, read_voc_classes
from data.labelled.segmentation_classes import PASCAL_VOC

SIZE = (6, 8)
LABELS = np.array([[0, 2, 284, 427, 397, 1, 459, 416]] * 6, np.uint16)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mask(*places: tuple[int, int]) -> np.ndarray:
    out = np.zeros(SIZE, np.uint8)
    out[tuple(zip(*places, strict=True))] = 1
    return out


def save_parts(path: Path, *things: tuple[int, list[tuple[str, np.ndarray]]]) -> None:
    """Writes an annotation as Pascal Part does: nested MATLAB structures."""
    part = np.dtype([("part_name", object), ("mask", object)])
    thing = np.dtype(
        [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
    )
    anno = np.dtype([("imname", object), ("objects", object)])
    objects = np.empty((1, len(things)), thing)
    for i, (number, parts) in enumerate(things):
        listed: Any = np.empty((1, len(parts)), part) if parts else np.empty((0, 0))
        for j, (name, where) in enumerate(parts):
            listed[0, j] = (name, where)
        objects[0, i] = (PASCAL_VOC[number], float(number), np.ones(SIZE, np.uint8), listed)
    whole = np.empty((1, 1), anno)
    whole[0, 0] = (path.stem, objects)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"anno": whole})


def write_pascal(root: Path) -> PascalContextLayout:
    """Two images: `a` trains and has people, `b` tests and has none."""
    for name, split in (("a", "train"), ("b", "val")):
        save(root / "JPEGImages" / f"{name}.jpg", np.full((*SIZE, 3), 90, np.uint8))
        context = root / "pascal-context" / "trainval"
        context.mkdir(parents=True, exist_ok=True)
        savemat(context / f"{name}.mat", {"LabelMap": LABELS})
        normals = np.full((*SIZE, 3), 127, np.uint8)
        normals[0] = (128, 128, 255)
        save(root / "normals_distill" / f"{name}.png", normals)
        saliency = np.zeros(SIZE, np.uint8)
        saliency[0], saliency[1] = 128, 127
        save(root / "sal_distill" / f"{name}.png", saliency)
        for lists in ("Context", "Parts"):
            (root / "ImageSets" / lists).mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / lists / f"{split}.txt").write_text(f"{name}\n")
    save_parts(
        root / "human_parts" / "a.mat",
        (15, [("hair", mask((0, 0))), ("neck", mask((0, 1), (0, 2))), ("rfoot", mask((5, 7)))]),
        (8, [("tail", mask((0, 3)))]),
        (15, [("luarm", mask((0, 2))), ("rhand", mask((1, 0))), ("ruleg", mask((1, 1)))]),
    )
    save_parts(root / "human_parts" / "b.mat", (8, [("tail", mask((0, 3)))]), (15, []))
    return PascalContextLayout(kind="pascal_context", root=root)


def write_nyud(root: Path) -> NyudLayout:
    """One image a split."""
    for name, split in (("0001", "train"), ("0002", "val")):
        save(root / "images" / f"{name}.png", np.full((*SIZE, 3), 90, np.uint8))
        save(root / "segmentation" / f"{name}.png", np.array([[0, 1, 40, 5] * 2] * 6, np.uint8))
        save(root / "normals" / f"{name}.png", np.full((*SIZE, 3), (255, 128, 128), np.uint8))
        (root / "depth").mkdir(exist_ok=True)
        np.save(root / "depth" / f"{name}.npy", np.array([[1.5, 0, -1, np.nan] * 2] * 6))
        (root / "gt_sets").mkdir(exist_ok=True)
        (root / "gt_sets" / f"{split}.txt").write_text(f"{name}\n\n")
    return NyudLayout(kind="nyud", root=root)


def test_pascal_context_is_read(tmp_path: Path) -> None:
    layout = write_pascal(tmp_path)
    assert (layout.samples("train"), layout.samples("test")) == (["a"], ["b"])
    sample = layout.read("a")
    assert (sample.name, sample.image.shape, sample.depth) == ("a", (*SIZE, 3), None)
    # Unlabelled, aeroplane, person, tvmonitor, table, accordion, a late class, train.
    assert sample.semseg[0].tolist() == [255, 1, 15, 20, 11, 0, 0, 19]
    assert sample.saliency is not None
    assert sample.saliency[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(sample.normals[0], [[0, 0, 1]] * 8, atol=0.01)
    assert (sample.normals[1:] == 0).all()


def test_parts_are_those_of_people_and_later_ones_cover_earlier(tmp_path: Path) -> None:
    layout = write_pascal(tmp_path)
    parts = layout.read("a").parts
    due = np.zeros(SIZE, int)
    for name, place in {
        "head": (0, 0),
        "torso": (0, 1),
        "upper arms": (0, 2),
        "lower arms": (1, 0),
        "upper legs": (1, 1),
        "lower legs": (5, 7),
    }.items():
        due[place] = PART_CLASSES.index(name)
    assert parts is not None
    assert parts.tolist() == due.tolist()


def test_an_image_without_a_persons_parts_is_ignored_there(tmp_path: Path) -> None:
    layout = write_pascal(tmp_path)
    for _ in range(2):
        parts = layout.read("b").parts
        assert parts is not None
        assert (parts == 255).all()
        (tmp_path / "human_parts" / "b.mat").unlink(missing_ok=True)  # the second time: no file


def test_segmentations_of_the_archive_come_before_the_map_of_459_classes(tmp_path: Path) -> None:
    layout = write_pascal(tmp_path)
    save(tmp_path / "semseg" / "VOC12" / "a.png", np.full(SIZE, 7, np.uint8))
    save(tmp_path / "semseg" / "pascal-context" / "a.png", np.full(SIZE, 8, np.uint8))
    save(tmp_path / "semseg" / "pascal-context" / "b.png", np.full(SIZE, 9, np.uint8))
    assert (layout.read("a").semseg == 7).all()
    assert (layout.read("b").semseg == 9).all()


def test_the_459_classes_are_in_alphabetical_order_and_so_are_vocs(tmp_path: Path) -> None:
    """Pascal Context calls the dining table a table; everything else keeps VOC's name."""
    path = tmp_path / "map.mat"
    savemat(path, {"LabelMap": np.stack([np.arange(460, dtype=np.uint16)] * 2)})
    numbers = read_voc_classes(path)[0]
    assert (numbers[0], (numbers == 0).sum()) == (255, 439)
    found = [PASCAL_VOC[n] for n in numbers[1:] if n]
    names = ["table" if name == "dining table" else name for name in found]
    assert names == sorted(names)
    assert len(found) == 20


def test_nyud_is_read(tmp_path: Path) -> None:
    layout = write_nyud(tmp_path)
    assert (layout.samples("train"), layout.samples("test")) == (["0001"], ["0002"])
    sample = layout.read("0002")
    assert sample.semseg[0].tolist() == [255, 0, 39, 4] * 2
    assert sample.depth is not None
    assert sample.depth[0].tolist() == [1.5, 0, 0, 0] * 2
    np.testing.assert_allclose(sample.normals[3, 3], [1, 0, 0], atol=0.01)
    assert (sample.parts, sample.saliency) == (None, None)


def test_a_layouts_tasks_are_those_that_its_samples_have(tmp_path: Path) -> None:
    for layout, name in (
        (write_pascal(tmp_path / "p"), "a"),
        (write_nyud(tmp_path / "n"), "0001"),
    ):
        sample = layout.read(name)._asdict()
        assert [k for k in sample if k not in ("name", "image") and sample[k] is not None] == list(
            layout.tasks
        )


def test_normals_are_unit_vectors_or_nothing() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((5, 7, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    colours = ((vectors + 1) * 127.5).round().astype(np.uint8)
    again = decode_normals(colours)
    np.testing.assert_allclose(again, vectors, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(again, axis=-1), 1, atol=1e-6)
    nothing = np.array([[[0, 0, 0], [127, 127, 127], [128, 128, 128]]], np.uint8)
    assert (decode_normals(nothing) == 0).all()


def test_a_missing_set_is_shown_with_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Context/train.txt; expected under(.|\n)*sal_distill"):
        PascalContextLayout(kind="pascal_context", root=tmp_path).samples("train")
    with pytest.raises(DataError, match=r"gt_sets/val.txt; expected under(.|\n)*depth/\*.npy"):
        NyudLayout(kind="nyud", root=tmp_path).samples("test")


@pytest.mark.parametrize(
    "missing", ["JPEGImages/a.jpg", "pascal-context", "normals_distill/a.png", "sal_distill/a.png"]
)
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    layout = write_pascal(tmp_path)
    path = tmp_path / missing
    path.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=f"no .*{missing}"):
        layout.read("a")


def test_labels_of_another_size_are_refused(tmp_path: Path) -> None:
    layout = write_nyud(tmp_path)
    np.save(tmp_path / "depth" / "0001.npy", np.ones((3, 4)))
    with pytest.raises(DataError, match="depth of 0001 has 3 x 4 px, its image 6 x 8 px"):
        layout.read("0001")


def test_classes_beyond_the_last_are_refused(tmp_path: Path) -> None:
    layout = write_nyud(tmp_path)
    save(tmp_path / "segmentation" / "0001.png", np.full(SIZE, 41, np.uint8))
    with pytest.raises(DataError, match=r"0001.png': expected 0 to 40, got 41"):
        layout.read("0001")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"Other": LABELS}, "has no LabelMap"),
        ({"LabelMap": LABELS + 1}, "expected a LabelMap of classes 0 to 459"),
        (None, "is no readable .mat file"),
    ],
)
def test_a_wrong_mat_file_is_named(
    tmp_path: Path, content: dict[str, Any] | None, message: str
) -> None:
    layout = write_pascal(tmp_path)
    path = tmp_path / "pascal-context" / "trainval" / "a.mat"
    path.write_text("none") if content is None else savemat(path, content)
    with pytest.raises(DataError, match=f"a.mat.*{message}"):
        layout.read("a")


def test_a_part_that_no_person_has_is_refused(tmp_path: Path) -> None:
    layout = write_pascal(tmp_path)
    save_parts(tmp_path / "human_parts" / "a.mat", (15, [("tail", mask((0, 3)))]))
    with pytest.raises(DataError, match=r"a.mat': expected parts of a person .* got 'tail'"):
        layout.read("a")


def test_the_kind_chooses_the_layout() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(MultiTaskLayout)
    assert isinstance(adapter.validate_python({"kind": "nyud", "root": "x"}), NyudLayout)
    with pytest.raises(ValidationError, match="'pascal_context', 'nyud'"):
        adapter.validate_python({"kind": "nyu", "root": "x"})
