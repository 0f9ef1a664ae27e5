"""Segmentation layouts, each on a tiny tree of exactly the form that users have on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from data.errors import DataError
from data.labelled.files import read_rgb
from data.labelled.segmentation import AnySegmentation
from data.labelled.segmentation_classes import CITYSCAPES, COCO_COARSE, COCO_FINE_OF_171
from data.labelled.segmentation_files import SegmentationLayout, renumbered


def layout(kind: str, root: Path, **options: Any) -> SegmentationLayout:
    adapter: TypeAdapter[Any] = TypeAdapter(AnySegmentation)
    found = adapter.validate_python({"kind": kind, "root": str(root), **options})
    assert isinstance(found, SegmentationLayout)
    return found


def write(path: Path, values: np.ndarray | None = None, palette: bool = False) -> None:
    """A picture, or a label map of these numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        Image.new("RGB", (3, 2), (10, 20, 30)).save(path)
        return
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image = Image.fromarray(values.astype(np.uint8), mode="P")
        image.putpalette([i % 256 for i in range(768)])
    image.save(path)


@pytest.mark.parametrize(
    "numbers, cure",
    [
        ([1, 2], r"did you mean dataset.first=1\? else set dataset.ignored=\[2\]"),
        ([0, 2], r"did you mean dataset.first=1 dataset.ignored=\[0\]\? else"),
        ([0, 128], "renumber the files, or list what does not count in dataset.ignored"),
    ],
)
def test_numbers_that_are_no_classes_have_a_cure(
    tmp_path: Path, numbers: list[int], cure: str
) -> None:
    write(tmp_path / "images/validation/a.png")
    write(tmp_path / "annotations/validation/a.png", np.resize(numbers, (2, 3)))
    with pytest.raises(DataError, match=rf"expected 0 to 1 or 255, got \d+: {cure}"):
        labels_of(layout("folder", tmp_path, classes=["a", "b"]))


def labels_of(found: SegmentationLayout, split: str = "test") -> list[list[int]]:
    (sample,) = found.samples(split)  # type: ignore[arg-type]
    image, labels = found.read(sample)
    assert image.shape == (2, 3, 3)
    assert labels.dtype == np.uint8
    return labels.tolist()  # type: ignore[no-any-return]


def test_ade20k_is_shifted_once_and_other_is_ignored(tmp_path: Path) -> None:
    top = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        write(top / f"images/{part}/ADE_1.jpg")
        write(top / f"annotations/{part}/ADE_1.png", np.array([[0, 1, 150], [2, 0, 3]]))
    found = layout("ade20k", tmp_path)
    assert labels_of(found) == labels_of(found, "train") == [[255, 0, 149], [1, 255, 2]]
    assert len(found.names) == 150
    (top / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n"
        + "".join(f"{i}\t0\t0\t0\tthing {i}\n" for i in range(1, 151))
    )
    assert found.names[:2] == ("thing 1", "thing 2")


@pytest.mark.parametrize("train_set, folder", [("train", ""), ("trainaug", "Aug")])
def test_voc_reads_the_indices_of_its_palette(tmp_path: Path, train_set: str, folder: str) -> None:
    top = tmp_path / "VOCdevkit/VOC2012"
    values = np.array([[0, 1, 20], [255, 0, 0]])
    for key, label in (("a", f"SegmentationClass{folder}"), ("b", "SegmentationClass")):
        write(top / f"JPEGImages/{key}.jpg")
        write(top / label / f"{key}.png", values, palette=True)
    lists = top / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / f"{train_set}.txt").write_text("a\n\n")
    (lists / "val.txt").write_text("b\n")
    found = layout("pascal_voc", tmp_path, train_set=train_set)
    assert [s.key for s in found.samples("train")] == ["a"]
    assert labels_of(found, "train") == labels_of(found) == values.tolist()
    assert len(found.names) == 21


def test_cityscapes_is_converted_from_label_ids(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write(tmp_path / f"leftImg8bit/{part}/bonn/bonn_1_2_leftImg8bit.png")
        values = np.array([[0, 7, 33], [255, 29, 11]])  # unlabelled, road, bicycle, plate, caravan
        write(tmp_path / f"gtFine/{part}/bonn/bonn_1_2_gtFine_labelIds.png", values)
    found = layout("cityscapes", tmp_path)
    assert labels_of(found) == labels_of(found, "train") == [[255, 0, 18], [255, 255, 2]]
    assert found.names == tuple(CITYSCAPES)


def coco_stuff(root: Path) -> None:
    for part in ("train2017", "val2017"):
        for key in ("000001", "000002"):
            write(root / f"images/{part}/{key}.jpg")
            write(root / f"annotations/{part}/{key}.png", np.array([[0, 8, 156], [255, 181, 11]]))
        write(root / f"curated/{part}/x.jpg")
        (root / f"curated/{part}/Coco164kFull_Stuff_Coarse.txt").write_text("000002\n")


def test_coco_stuff_has_27_coarse_classes_of_things_and_stuff(tmp_path: Path) -> None:
    coco_stuff(tmp_path)
    found = layout("coco_stuff", tmp_path, curated=True)
    names = list(COCO_COARSE)
    sky, solid, outdoor = names.index("sky"), names.index("solid"), names.index("outdoor")
    expected = [[names.index("person"), names.index("vehicle"), sky], [255, solid, outdoor]]
    assert labels_of(found) == expected
    assert [sample.key for sample in found.samples("train")] == ["000002"]


def test_coco_stuff_has_171_classes_where_asked(tmp_path: Path) -> None:
    coco_stuff(tmp_path)
    found = layout("coco_stuff", tmp_path, curated=True, num_classes=171)
    assert len(found.names) == 171
    assert labels_of(found) == [[0, 8, COCO_FINE_OF_171.index(156)], [255, 170, 255]]
    assert len(layout("coco_stuff", tmp_path).samples("test")) == 2


def test_every_number_of_coco_stuff_has_one_coarse_class() -> None:
    numbers = sorted(n for group in COCO_COARSE.values() for n in group)
    assert numbers == list(range(182))
    assert (len(COCO_COARSE), len(COCO_FINE_OF_171)) == (27, 171)


def test_a_curated_image_that_is_missing_is_named(tmp_path: Path) -> None:
    coco_stuff(tmp_path)
    (tmp_path / "images/train2017/000002.jpg").unlink()
    with pytest.raises(DataError, match=r"no 000002.jpg, which is in the list"):
        layout("coco_stuff", tmp_path, curated=True).samples("train")


def test_pascal_context_has_59_classes_or_60_with_background(tmp_path: Path) -> None:
    top = tmp_path / "VOCdevkit/VOC2010"
    write(top / "JPEGImages/a.jpg")
    write(top / "SegmentationClassContext/a.png", np.array([[0, 1, 59], [2, 0, 0]]))
    lists = top / "ImageSets/SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a\n")
    assert labels_of(layout("pascal_context", tmp_path)) == [[255, 0, 58], [1, 255, 255]]
    with_background = layout("pascal_context", tmp_path, background=True)
    assert labels_of(with_background) == [[0, 1, 59], [2, 0, 0]]
    assert len(with_background.names) == 60


def test_camvid_ignores_void(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part / "a.png")
        write(tmp_path / f"{part}annot" / "a.png", np.array([[0, 10, 11], [1, 2, 3]]))
    found = layout("camvid", tmp_path)
    assert labels_of(found) == labels_of(found, "train") == [[0, 10, 255], [1, 2, 3]]
    assert len(found.names) == 11


def test_labelme_facade_reads_the_colours_of_rgba_label_maps(tmp_path: Path) -> None:
    write(tmp_path / "images/a.jpg")
    colours = np.zeros((2, 3, 4), np.uint8)
    colours[..., 3] = 255
    colours[0, 0, :3], colours[0, 1, :3], colours[1, 2, :3] = (128, 0, 0), (0, 0, 128), (9, 9, 9)
    (tmp_path / "labels").mkdir()
    Image.fromarray(colours).save(tmp_path / "labels/a.png")
    (tmp_path / "test.txt").write_text("a.jpg\n")
    found = layout("labelme_facade", tmp_path)
    assert labels_of(found) == [[0, 7, 255], [255, 255, 255]]


def test_folders_of_ones_own_take_a_first_number_and_others_to_ignore(tmp_path: Path) -> None:
    write(tmp_path / "in/a.png")
    write(tmp_path / "out/a.png", np.array([[1, 2, 9], [255, 1, 1]]))
    options: dict[str, Any] = {"classes": ["x", "y"], "first": 1, "test": ["in", "out"]}
    found = layout("folder", tmp_path, ignored=[9], **options)
    assert labels_of(found) == [[0, 1, 255], [255, 0, 0]]
    with pytest.raises(DataError, match=r"expected 1 to 2 or 255, got 9"):
        labels_of(layout("folder", tmp_path, **options))


def test_folders_of_ones_own_may_be_coloured(tmp_path: Path) -> None:
    write(tmp_path / "images/validation/a.jpg")
    path = tmp_path / "annotations/validation/a.png"
    write(path)
    options = {"classes": ["x", "y"], "colours": [[1, 1, 1], [10, 20, 30]]}
    assert labels_of(layout("folder", tmp_path, **options)) == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(ValidationError, match="1 colours for 2 classes"):
        layout("folder", tmp_path, classes=["x", "y"], colours=[[1, 1, 1]])


def test_coloured_labels_where_numbers_are_due_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "images/validation/a.jpg")
    write(tmp_path / "annotations/validation/a.png")
    with pytest.raises(DataError, match="expected one channel of class numbers, got 3"):
        labels_of(layout("folder", tmp_path, classes=["x", "y"]))


def test_grey_and_palette_photographs_are_read_as_rgb(tmp_path: Path) -> None:
    """As every labelled set reads them: 23 of 1,000 of ImageNet's are grey."""
    grey = np.array([[0, 100, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png").tolist() == [[[v] * 3 for v in (0, 100, 255)]]
    palette = Image.fromarray(np.array([[1, 0]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "palette.png")
    assert read_rgb(tmp_path / "palette.png").tolist() == [[[200, 100, 50], [10, 20, 30]]]


def test_labels_of_another_size_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "images/validation/a.jpg")
    write(tmp_path / "annotations/validation/a.png", np.zeros((3, 3)))
    with pytest.raises(DataError, match="is 3 x 3, its image 2 x 3"):
        labels_of(layout("folder", tmp_path, classes=["x", "y"]))


KINDS = (
    *("ade20k", "camvid", "cityscapes", "coco_stuff", "labelme_facade"),
    *("pascal_context", "pascal_voc"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_not_there_is_shown_as_a_tree(tmp_path: Path, kind: str, split: Any) -> None:
    found = layout(kind, tmp_path)
    with pytest.raises(DataError) as caught:
        found.samples(split)
    assert str(caught.value).startswith("there is no ")
    assert found.tree in str(caught.value)


def test_an_empty_folder_is_shown_as_a_tree(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"no image \(jpg.* in .*/test; expected under"):
        layout("camvid", tmp_path).samples("test")


def test_numbers_of_any_width_are_renumbered() -> None:
    values = np.array([[5, 1000]], np.int32)
    assert renumbered(values, {5: 1, 1000: 255}, Path("x")).tolist() == [[1, 255]]
