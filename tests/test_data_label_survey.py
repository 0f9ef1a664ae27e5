"""The survey of segmentation sets: classes without a pixel, void, and labels in another coding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from data.errors import DataError
from data.labelled.label_survey import LabelSurvey
from data.labelled.segmentation import AnySegmentation
from data.labelled.survey import Finding, told
from tests.label_sets import halves, write_labels

AB = ["a", "b"]
RED, BLUE, GREY = (200, 0, 0), (0, 0, 200), (90, 90, 90)


def survey(root: Path, train: Sequence[Any], test: Sequence[Any], **options: Any) -> LabelSurvey:
    entry = write_labels(root, {"train": train, "test": test})
    options.setdefault("classes", AB)
    return LabelSurvey(TypeAdapter(AnySegmentation).validate_python(entry | options))


def judged(root: Path, train: Sequence[Any], test: Sequence[Any], **options: Any) -> list[Finding]:
    found = survey(root, train, test, **options)
    return found.judge(found.count())


def fatal(findings: Sequence[Finding]) -> str:
    return "; ".join(told(finding for finding in findings if finding.fatal))


def warned(findings: Sequence[Finding]) -> str:
    return "; ".join(told(finding for finding in findings if not finding.fatal))


def test_pixels_are_counted_by_class_and_split(tmp_path: Path) -> None:
    found = survey(tmp_path, [halves(0, 1), halves(1, 255)], [halves(1, 0)])
    counts = found.count()
    assert counts["train"] == {
        "images": 2,
        "images_without_label": 0,
        "pixels": 128,
        "ignored": 32,
        "classes": [32, 64],
        "sizes": [(8, 8)],
    }
    assert counts["test"]["classes"] == [32, 32]
    assert found.judge(counts) == []
    assert len(found.files()) == 6


def test_binary_masks_of_0_and_255_are_refused_with_what_to_set(tmp_path: Path) -> None:
    masks = [halves(0, 255)]
    text = fatal(judged(tmp_path, masks, masks))
    assert "all labelled pixels of train (32) are of one class, 'a'; expected 2 classes" in text
    assert "labels 0 and 255 found: did you mean a binary mask with 255 as class 1, 'b'?" in text
    assert "dataset.colours=[[0,0,0],[255,255,255]]" in text


def test_the_cure_for_binary_masks_works(tmp_path: Path) -> None:
    masks = [halves(0, 255)]
    cured = {"colours": [[0, 0, 0], [255, 255, 255]]}
    assert judged(tmp_path, masks, masks, **cured) == []


@pytest.mark.parametrize("wrong", ["train", "test"])
def test_one_split_in_another_coding_is_refused(tmp_path: Path, wrong: str) -> None:
    splits = {"train": [halves(0, 1)], "test": [halves(0, 1)]} | {wrong: [halves(0, 255)]}
    text = fatal(judged(tmp_path, **splits))
    assert f"labelled pixels of {wrong} (32) are of one class" in text
    assert "did you mean a binary mask" in text


def test_255_as_the_last_of_three_classes_is_refused_unless_stated(tmp_path: Path) -> None:
    maps = [halves(0, 1), halves(1, 255)]
    abc = [*AB, "c"]
    text = fatal(judged(tmp_path, maps, maps, classes=abc))
    assert "labels 0, 1, 255 found, none of the last class, 'c', and 25 % of the pixels" in text
    assert "dataset.ignored=[255]" in text
    found = judged(tmp_path, maps, maps, classes=abc, ignored=[255])
    assert not fatal(found)
    assert "no pixel anywhere of 1 of 3 classes (c): left out of the mean" in warned(found)


@pytest.mark.parametrize("empty", ["train", "test"])
def test_a_split_of_void_only_is_refused(tmp_path: Path, empty: str) -> None:
    splits = {"train": [halves(0, 1)], "test": [halves(0, 1)]} | {empty: [halves(255, 255)]}
    found = judged(tmp_path, **splits)
    assert f"{empty} has no pixel of any class" in fatal(found)
    assert f"100 % of the pixels of {empty} are ignored" in warned(found)


def test_a_class_that_one_split_lacks_is_a_warning(tmp_path: Path) -> None:
    abc = [*AB, "c"]
    found = judged(tmp_path, [halves(0, 1)], [halves(0, 2), halves(0, 1)], classes=abc)
    assert not fatal(found)
    assert "no pixel in train of 1 of 3 classes (c): never learned" in warned(found)
    found = judged(tmp_path, [halves(0, 1), halves(2, 1)], [halves(0, 1)] * 2, classes=abc)
    assert "no pixel in test of 1 of 3 classes (c): never counted" in warned(found)


def test_splits_without_a_common_class_are_refused(tmp_path: Path) -> None:
    found = judged(tmp_path, [halves(0, 1)], [halves(2, 3)], classes=[*AB, "c", "d"])
    assert "train and test have no class in common" in fatal(found)


def test_mostly_void_is_a_warning_and_half_is_not(tmp_path: Path) -> None:
    some = [halves(0, 1), halves(255, 255), halves(255, 255)]
    found = judged(tmp_path, some, [halves(0, 1)])
    assert not fatal(found)
    assert "66.7 % of the pixels of train are ignored" in warned(found)
    assert judged(tmp_path / "half", some[:2], [halves(0, 1)]) == []


def test_colours_in_bgr_order_are_refused(tmp_path: Path) -> None:
    maps = [halves(RED[::-1], GREY), halves((0, 200, 200), GREY)]
    colours = [RED, GREY, (200, 200, 0)]
    found = judged(tmp_path, maps, maps, classes=[*AB, "c"], colours=colours)
    assert "50 % of the pixels of train have unknown colours ((0, 0, 200) 25 %" in fatal(found)
    assert "most of these are colours of the list in BGR order, as OpenCV writes" in fatal(found)


def test_colours_that_jpeg_moved_are_a_warning(tmp_path: Path) -> None:
    near = (RED[0] - 5, 3, 2)
    maps = [halves(RED, BLUE), halves(near, near), halves(near, near)]
    found = judged(tmp_path, maps, maps, colours=[RED, BLUE])
    assert "most of these are close to one of the list: saved as JPEG" in warned(found)


def test_colours_of_another_list_are_named(tmp_path: Path) -> None:
    maps = [halves((1, 2, 3), (4, 5, 6))]
    text = fatal(judged(tmp_path, maps, maps, colours=[RED, BLUE]))
    assert "train has no pixel of any class; the most frequent unknown colours of train" in text
    assert "(1, 2, 3) 50 %, (4, 5, 6) 50 %" in text


def test_a_bad_mask_of_the_test_split_is_found(tmp_path: Path) -> None:
    found = survey(tmp_path, [halves(0, 1)], [halves(0, 1), halves(0, 7)])
    with pytest.raises(DataError, match=r"validation/test1.png': expected 0 to 1 or 255, got 7"):
        found.count()


def test_a_mask_of_another_size_than_its_image_is_found(tmp_path: Path) -> None:
    found = survey(tmp_path, [halves(0, 1)], [halves(0, 1), halves(0, 1)])
    write_labels(tmp_path, {"test": [halves(0, 1), np.zeros((9, 8), np.uint8)]})
    Image.new("RGB", (8, 8)).save(tmp_path / "images/validation/test1.png")
    with pytest.raises(DataError, match=r"test1.png' is 9 x 8, its image 8 x 8"):
        found.count()


def test_testing_on_training_images_is_a_warning(tmp_path: Path) -> None:
    folders = ["images/training", "annotations/training"]
    entry = write_labels(tmp_path, {"train": [halves(0, 1)]}) | {"classes": AB, "test": folders}
    both = LabelSurvey(TypeAdapter(AnySegmentation).validate_python(entry))
    found = both.judge(both.count())
    assert "1 of 1 test images are training images too" in warned(found)
