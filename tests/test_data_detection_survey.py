"""The survey of detection sets: boxes that are missing, beyond their image, or in another form."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.errors import DataError
from data.labelled.detection import CocoLayout
from data.labelled.detection_survey import DetectionSurvey
from data.labelled.survey import Finding, told

SIZE = (60, 80)  # (height, width)
BOX = [10, 20, 30, 25]


def write(root: Path, split: str, boxes: list[list[float]], **changes: Any) -> None:
    """One split of three images; the boxes go to them in turn, with classes in turn."""
    (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images = []
    for number in range(3):
        name = f"{split}{number}.png"
        Image.new("RGB", SIZE[::-1], (number, 9, 9)).save(root / f"{split}2017" / name)
        facts = {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        images.append(facts)
    marks = [
        {"id": i, "image_id": i % 3, "category_id": 1 + i % 2, "bbox": box, "area": 9, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    tree = {"images": images, "annotations": marks, "categories": categories} | changes
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tree))


def survey(root: Path, **boxes: list[list[float]]) -> DetectionSurvey:
    for split in ("train", "val"):
        write(root, split, boxes.get(split, [BOX] * 4))
    return DetectionSurvey(CocoLayout(root=root))


def judged(root: Path, **boxes: list[list[float]]) -> list[Finding]:
    found = survey(root, **boxes)
    return found.judge(found.count())


def text(findings: list[Finding], fatal: bool) -> str:
    return "; ".join(told(finding for finding in findings if finding.fatal is fatal))


def test_boxes_are_counted_by_class_and_split(tmp_path: Path) -> None:
    counts = survey(tmp_path).count()["train"]
    assert (counts["images"], counts["boxes"], counts["classes"]) == (3, 4, [2, 2])
    assert counts["images_without_box"] == 0
    assert judged(tmp_path) == []


@pytest.mark.parametrize("split, name", [("train", "train"), ("val", "test")])
def test_a_split_without_a_box_is_refused(tmp_path: Path, split: str, name: str) -> None:
    assert f"{name} has no box of any class" in text(judged(tmp_path, **{split: []}), True)


def test_crowds_and_boxes_without_area_do_not_count_as_boxes(tmp_path: Path) -> None:
    found = judged(tmp_path, train=[[5, 5, 0, 9], [5, 5, 9, 0]])
    assert "train has no box of any class" in text(found, True)
    assert "2 boxes of train have no area" in text(found, False)


def test_a_class_without_a_box_is_a_warning(tmp_path: Path) -> None:
    found = judged(tmp_path, train=[BOX])
    assert not text(found, True)
    assert "no box in train of 1 of 2 classes (dog): never learned" in text(found, False)


def test_corners_in_place_of_width_and_height_are_refused(tmp_path: Path) -> None:
    corners = [[30, 20, 70, 55], [40, 30, 79, 59]]
    found = judged(tmp_path, train=corners)
    assert "100 % of the boxes of train exceed their image: are they [left, top, right" in text(
        found, True
    )


def test_shares_of_the_image_are_refused(tmp_path: Path) -> None:
    found = judged(tmp_path, train=[[0.1, 0.2, 0.3, 0.4]] * 2, val=[[0.1, 0.2, 0.3, 0.4]] * 2)
    assert "are they shares of the image's sides? expected [left, top" in text(found, True)


def test_a_box_that_occurs_twice_is_a_warning(tmp_path: Path) -> None:
    found = judged(tmp_path, val=[BOX] * 3 + [[1, 1, 9, 9]] * 3 + [BOX] * 6)
    assert "boxes of test occur twice in their image" in text(found, False)


def test_an_unknown_image_or_category_is_named(tmp_path: Path) -> None:
    survey(tmp_path)
    for key, noun in (("image_id", "images"), ("category_id", "categories")):
        mark = {"id": 7, "image_id": 0, "category_id": 1, "bbox": BOX, "area": 9} | {key: 999}
        write(tmp_path, "train", [], annotations=[mark])
        message = rf"annotation 7 has {key} 999, and none of the \d entries of {noun} has this id"
        with pytest.raises(DataError, match=message):
            CocoLayout(root=tmp_path).load("train")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    survey(tmp_path)
    write(tmp_path, "train", [], annotations=[{"image_id": 0, "category_id": 1, "area": 9}])
    with pytest.raises(DataError, match="not in COCO's format: an entry lacks the key 'bbox'"):
        CocoLayout(root=tmp_path).load("train")


@pytest.mark.parametrize("section, noun", [("images", "image"), ("categories", "category")])
def test_an_id_that_occurs_twice_is_refused(tmp_path: Path, section: str, noun: str) -> None:
    survey(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    tree = json.loads(path.read_text())
    tree[section].append(tree[section][0])
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=rf"the {noun} id [01] occurs more than once"):
        CocoLayout(root=tmp_path).load("test")


def test_a_missing_or_wrong_image_of_the_test_split_is_found(tmp_path: Path) -> None:
    found = survey(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "val2017/val2.png")
    with pytest.raises(DataError, match=r"val2.png' has 9 x 9 px, but its annotations are for 60"):
        found.count()


@pytest.mark.parametrize("bbox", [[1, 2, 3], [1, 2, 3, 4, 5], [float("nan"), 2, 3, 4], None])
def test_a_box_that_is_none_is_named(tmp_path: Path, bbox: Any) -> None:
    survey(tmp_path)
    mark = {"id": 7, "image_id": 0, "category_id": 1, "bbox": bbox, "area": 9}
    write(tmp_path, "train", [], annotations=[mark])
    with pytest.raises(
        DataError, match=r"not in COCO's format: annotation 7: expected a bbox of four"
    ):
        CocoLayout(root=tmp_path).load("train")


def test_ids_of_another_type_and_shared_names_are_named(tmp_path: Path) -> None:
    survey(tmp_path)
    mark = {"id": 7, "image_id": "0", "category_id": 1, "bbox": BOX, "area": 9}
    write(tmp_path, "train", [], annotations=[mark])
    with pytest.raises(DataError, match="annotation 7 has image_id '0', and none of the 3"):
        CocoLayout(root=tmp_path).load("train")
    write(tmp_path, "train", [BOX], categories=[{"id": i, "name": "cat"} for i in (1, 2)])
    with pytest.raises(DataError, match="two categories are named 'cat'"):
        CocoLayout(root=tmp_path).load("train")


def test_other_sizes_of_images_are_other_data(tmp_path: Path) -> None:
    right = survey(tmp_path)
    tree = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    for image in tree["images"]:
        image["height"], image["width"] = image["width"], image["height"]
    write(tmp_path, "train", [BOX] * 4, images=tree["images"])
    turned = DetectionSurvey(CocoLayout(root=tmp_path))
    assert turned.parsed() != right.parsed()  # else counts of the right sizes were kept for these


def test_another_file_than_cocos_is_told(tmp_path: Path) -> None:
    survey(tmp_path)
    (tmp_path / "annotations/instances_val2017.json").write_text("[]")
    with pytest.raises(DataError, match="expected a mapping with images, annotations and"):
        CocoLayout(root=tmp_path).load("test")


def test_an_image_with_two_ids_is_refused(tmp_path: Path) -> None:
    survey(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    tree = json.loads(path.read_text())
    tree["images"].append(tree["images"][0] | {"id": 77})
    path.write_text(json.dumps(tree))
    found = DetectionSurvey(CocoLayout(root=tmp_path))
    refused = text(found.judge(found.count()), True)
    assert "1 images of test have several ids (val0.png): each would count several" in refused
