"""COCO's layout, and boxes that follow their images on to a canvas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.labelled.detection import CocoLayout, place_on_canvas, read_annotated
from tests.shapes import write_shapes

MARKS: list[dict[str, Any]] = [
    {"id": 5, "image_id": 9, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 10.5, "iscrowd": 0},
    {"id": 6, "image_id": 9, "category_id": 2, "bbox": [0, 0, 8, 6], "area": 40, "iscrowd": 1},
]


def write_coco(root: Path, marks: list[dict[str, Any]]) -> CocoLayout:
    """One image with marks, and one without, in both splits."""
    (root / "annotations").mkdir(parents=True)
    tree = {
        "images": [
            {"id": 9, "file_name": "000000000009.jpg", "height": 6, "width": 8},
            {"id": 4, "file_name": "000000000004.jpg", "height": 6, "width": 8},
        ],
        "annotations": marks,
        "categories": [{"id": 90, "name": "brush"}, {"id": 2, "name": "bicycle"}],
    }
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for entry in tree["images"]:
            Image.new("RGB", (8, 6)).save(root / split / str(entry["file_name"]))
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    return CocoLayout(root=root)


def test_instances_are_read_by_the_order_of_their_numbers(tmp_path: Path) -> None:
    layout = write_coco(tmp_path, MARKS)
    for split, folder in (("train", "train2017"), ("test", "val2017")):
        classes, images = layout.load(split)  # type: ignore[arg-type]
        assert classes == ("bicycle", "brush")
        assert [image.path for image in images] == [
            tmp_path / folder / f"00000000000{number}.jpg" for number in (4, 9)
        ]
        empty, full = (image.objects for image in images)
        assert empty.boxes.shape == (0, 4)
        assert full.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 8, 6]]
        assert full.labels.tolist() == [1, 0]
        assert full.areas.tolist() == [10.5, 40]
        assert full.crowds.tolist() == [False, True]
        assert read_annotated(images[0]).shape == (6, 8, 3)


def test_a_missing_set_is_shown_with_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*train2017; expected(.|\n)*instances_val2017.json"):
        CocoLayout(root=tmp_path).load("train")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(DataError, match=r"no .*annotations/instances_val2017.json; expected"):
        CocoLayout(root=tmp_path).load("test")


@pytest.mark.parametrize(
    "mark", [{"image_id": 1}, {"category_id": 3}, {"bbox": [1, 2, 3]}, {"area": None}]
)
def test_marks_that_do_not_fit_are_refused(tmp_path: Path, mark: dict[str, Any]) -> None:
    layout = write_coco(tmp_path, [{**MARKS[0], **mark}])
    with pytest.raises(DataError, match=r"instances_train2017.json' is not in COCO's format"):
        layout.load("train")


def test_an_image_of_another_size_than_its_marks_is_refused(tmp_path: Path) -> None:
    images = write_coco(tmp_path, MARKS).load("train").images
    Image.new("RGB", (7, 6)).save(images[0].path)
    with pytest.raises(DataError, match="has 6 x 7 px, but its annotations are for 6 x 8 px"):
        read_annotated(images[0])


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("canvas", [(60, 100), (120, 40), (48, 64)])
def test_a_box_survives_resizing_flipping_and_padding(
    canvas: tuple[int, int], flipped: bool
) -> None:
    """The edges of a bright rectangle are where its box says, to a quarter of a pixel."""
    pixels = np.zeros((36, 48, 3), np.uint8)
    box = np.array([[6.0, 9.0, 30.0, 27.0]])
    pixels[9:27, 6:30] = 255
    out, placement = place_on_canvas(pixels, canvas, flipped=flipped)
    assert out.shape == (*canvas, 3)
    content = out[: placement.size[0], : placement.size[1], 0] / 255
    left, top, right, bottom = placement.to_canvas(box)[0]
    columns, rows = content.max(0), content.max(1)
    # Partly covered pixels count by their share: bright sums are lengths and places.
    assert columns.sum() == pytest.approx(right - left, abs=0.3)
    assert rows.sum() == pytest.approx(bottom - top, abs=0.3)
    x, y = np.arange(len(columns)) + 0.5, np.arange(len(rows)) + 0.5
    assert (columns * x).sum() / columns.sum() == pytest.approx((left + right) / 2, abs=0.25)
    assert (rows * y).sum() / rows.sum() == pytest.approx((top + bottom) / 2, abs=0.25)
    np.testing.assert_allclose(placement.to_image(placement.to_canvas(box)), box, atol=1e-9)


def test_the_canvas_is_grey_where_the_image_is_not() -> None:
    out, placement = place_on_canvas(np.full((10, 20, 3), 255, np.uint8), (32, 40), flipped=True)
    assert placement.size == (20, 40)
    assert (out[:20] == 255).all()
    assert (out[20:] == 128).all()


def test_an_images_own_border_is_its_border_on_the_canvas() -> None:
    """Also where whole pixels give the two sides other ratios."""
    _, placement = place_on_canvas(np.zeros((36, 49, 3), np.uint8), (7, 64), flipped=False)
    assert placement.size == (7, 10)
    assert placement.to_canvas(np.array([[0.0, 0, 49, 36]])).tolist() == [[0, 0, 10, 7]]


def test_boxes_are_cut_off_at_the_image() -> None:
    _, placement = place_on_canvas(np.zeros((10, 20, 3), np.uint8), (40, 40), flipped=False)
    beyond = np.array([[-8.0, 4.0, 60.0, 39.0]])
    assert placement.to_image(beyond).tolist() == [[0, 2, 20, 10]]


def test_shapes_lie_in_their_boxes(tmp_path: Path) -> None:
    """The generator of the easy set, which other tests rely on."""
    classes, images = CocoLayout(root=write_shapes(tmp_path / "set", 3, 1)).load("train")
    assert classes == ("square", "disc")
    for image in images:
        pixels = read_annotated(image).astype(int)
        coloured = np.abs(pixels - 110).max(2) > 0
        for box, label, area in zip(*image.objects[:3], strict=True):
            left, top, right, bottom = box.astype(int)
            part = coloured[top:bottom, left:right]
            assert part.sum() == area
            assert part.any(0).all()
            assert part.any(1).all()
            assert part[0, 0] == (label == 0)
            coloured[top:bottom, left:right] = False
        assert not coloured.any()
