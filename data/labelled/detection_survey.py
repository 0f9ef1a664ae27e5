"""The survey of a detection set: boxes of each class, in both splits."""

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data.errors import DataError
from data.labelled.class_counts import judge_classes
from data.labelled.detection import AnnotatedImage, CocoLayout, DetectionSet, read_annotated
from data.labelled.files import read_size
from data.labelled.layout import Split
from data.labelled.survey import Finding, Survey, listed, per_cent, same_images
from data.read_ahead import read_ahead

_EDGE = 1.0  # pixels by which boxes may exceed their image: COCO rounds some
_MANY = 0.2  # share of the boxes that is no accident


class DetectionSurvey(Survey):
    """Counts boxes.

    Args:
        dataset: in COCO's format.
    """

    noun = "boxes"

    def __init__(self, dataset: CocoLayout) -> None:
        self.root, self.tree = dataset.root, dataset.tree
        self.options = dataset.model_dump_json()
        self._sets = {split: dataset.load(split) for split in get_args(Split)}
        train, test = self._sets.values()
        if train.classes != test.classes:
            differing = sorted({*train.classes} ^ {*test.classes})
            shown = f" ({', '.join(differing[:3])})" if differing else ", in another order"
            raise DataError(
                f"{dataset.root}: training and test images have different classes{shown}"
            )

    def files(self) -> list[Path]:
        """See `Survey.files`; without the annotations, which `parsed` has."""
        return list(dict.fromkeys(i.path for s in self._sets.values() for i in s.images))

    def parsed(self) -> str:
        """The classes, sizes and boxes."""
        return repr(
            [
                (
                    each.classes,
                    [(i.path.name, i.size, *(a.tolist() for a in i.objects)) for i in each.images],
                )
                for each in self._sets.values()
            ]
        )

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        for each in self._sets.values():
            read_annotated(each.images[0])
            for _ in read_ahead(_check_size, each.images):
                pass
        return {split: _counts(each) for split, each in self._sets.items()}

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        names = self._sets["train"].classes
        findings = [f for split, each in counts.items() for f in _judge_boxes(split, each)]
        by_class = {split: each["classes"] for split, each in counts.items()}
        # AP is a mean over the classes that occur.
        found = judge_classes(names, by_class, "box", one_suffices=True)
        images = {s: [image.path for image in each.images] for s, each in self._sets.items()}
        for split, paths in images.items():
            twice = sorted(path.name for path, times in Counter(paths).items() if times > 1)
            if twice:
                text = f"{len(twice)} images of {split} have several ids ({listed(twice)})"
                findings.append(Finding(f"{text}: each would count several times", fatal=True))
        return findings + found + same_images(images)


def _check_size(image: AnnotatedImage) -> None:
    stored = read_size(image.path)
    if stored != image.size:
        raise DataError(
            f"the image '{image.path}' has {stored[0]} x {stored[1]} px, but its annotations are "
            f"for {image.size[0]} x {image.size[1]} px"
        )


def _counts(found: DetectionSet) -> dict[str, Any]:
    classes = np.zeros(len(found.classes), np.int64)
    flat = outside = corners = relative = repeated = boxes = crowds = empty = 0
    for image in found.images:
        solid = ~image.objects.crowds
        crowds += int((~solid).sum())
        marks, labels = image.objects.boxes[solid], image.objects.labels[solid]
        height, width = image.size
        left, top, right, bottom = marks.T
        has_area = (right > left) & (bottom > top)
        classes += np.bincount(labels[has_area], minlength=len(classes))
        boxes, flat = boxes + len(marks), flat + int((~has_area).sum())
        beyond = (marks < -_EDGE).any(1) | (right > width + _EDGE) | (bottom > height + _EDGE)
        outside += int(beyond.sum())
        # As [left, top, right, bottom], where the last two were taken for width and height.
        inside = (right - left <= width + _EDGE) & (bottom - top <= height + _EDGE)
        ordered = (right - left > left) & (bottom - top > top)
        corners += int((beyond & inside & ordered).sum())
        relative += int((np.abs(marks) <= 2).all(1).sum())
        rows = np.c_[marks, labels]
        repeated += len(rows) - len(np.unique(rows, axis=0))
        empty += not has_area.any()
    return {
        "images": len(found.images),
        "images_without_box": empty,
        "boxes": boxes,
        "classes": classes.tolist(),
        "crowds": crowds,
        "without_area": flat,
        "outside": outside,
        "outside_but_not_as_corners": corners,
        "relative": relative,
        "repeated": repeated,
    }


def _judge_boxes(split: str, counts: dict[str, Any]) -> list[Finding]:
    boxes, findings = counts["boxes"], []
    expected = "expected [left, top, width, height] in pixels"
    if not boxes:
        return []
    if counts["relative"] > _MANY * boxes:
        text = f"{counts['relative']} of {boxes} boxes of {split} are smaller than 2 px"
        fatal = counts["relative"] == boxes
        return [Finding(f"{text}: are they shares of the image's sides? {expected}", fatal)]
    if counts["outside"] > _MANY * boxes:
        as_corners = counts["outside_but_not_as_corners"] > 0.9 * counts["outside"]
        cause = ": are they [left, top, right, bottom]?" if as_corners else ";"
        share = per_cent(counts["outside"], boxes)
        text = f"{share} of the boxes of {split} exceed their image{cause} {expected}"
        findings.append(Finding(text, fatal=as_corners))
    elif counts["outside"]:
        findings.append(
            Finding(f"{counts['outside']} of {boxes} boxes of {split} exceed their image")
        )
    if counts["without_area"]:
        findings.append(
            Finding(f"{counts['without_area']} boxes of {split} have no area and do not train")
        )
    if counts["repeated"]:
        findings.append(
            Finding(
                f"{counts['repeated']} boxes of {split} occur twice in their image, with the same "
                "class: each counts as an object"
            )
        )
    return findings
