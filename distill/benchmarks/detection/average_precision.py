"""COCO's average precision, computed by faster-coco-eval."""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.labelled.detection import DetectionSet
from distill.runtime.errors import RecipeError

MAX_DETECTIONS = 100  # of each image that count
_METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # COCO's first six


class Detections(NamedTuple):
    """The detections in one image.

    Attributes:
        boxes: (M, 4) left, top, right, bottom in pixels of the stored image.
        scores: (M,).
        labels: (M,) class numbers.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def require_coco_eval() -> None:
    """Checks that AP can be computed.

    Raises:
        RecipeError: faster-coco-eval is not installed.
    """
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise RecipeError(
            "kind: detection needs faster-coco-eval, which is not installed; "
            "`pip install faster-coco-eval`, or install this project with its extra [detection]"
        )


def average_precision(truth: DetectionSet, found: Sequence[Detections]) -> dict[str, float]:
    """COCO's AP of boxes, in per cent.

    Args:
        truth: the annotated images. Detections on a crowd are ignored.
        found: in each image; at most MAX_DETECTIONS of them count, those of highest score.

    Returns:
        `ap`, the mean over IoU 0.50 to 0.95 in steps of 0.05 and over the classes that occur;
        `ap50` and `ap75` at one IoU; and for objects below 32 x 32 px, up to 96 x 96 px and above:
        `ap_small`, `ap_medium`, `ap_large`. Sizes that no object has are left out.

    Raises:
        DataError: the test images have no object.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if not any((~image.objects.crowds).any() for image in truth.images):
        raise DataError("the test images have no object, so there is no AP")
    marked = COCO(_ground_truth(truth))
    results = marked.loadRes(
        [entry for i, each in enumerate(found, start=1) for entry in _results(i, each)]
    )
    evaluation = COCOeval_faster(marked, results, iouType="bbox")
    evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
    evaluation.run()
    values = (float(value) for value in evaluation.stats[: len(_METRICS)])
    return {name: 100 * value for name, value in zip(_METRICS, values, strict=True) if value >= 0}


def _ground_truth(truth: DetectionSet) -> dict[str, Any]:
    """The set in COCO's format; numbers start at 1, as 0 means unmatched."""
    marks = [
        {
            "id": 0,
            "image_id": i,
            "category_id": int(label) + 1,
            "bbox": [*box[:2], *(box[2:] - box[:2])],
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for i, image in enumerate(truth.images, start=1)
        for box, label, area, crowd in zip(*image.objects, strict=True)
    ]
    for number, mark in enumerate(marks, start=1):
        mark["id"] = number
    images = [
        {"id": i, "height": image.size[0], "width": image.size[1]}
        for i, image in enumerate(truth.images, start=1)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(truth.classes, start=1)]
    return {"images": images, "categories": categories, "annotations": marks}


def _results(image: int, found: Detections) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "category_id": int(label) + 1,
            "bbox": [*box[:2], *(box[2:] - box[:2])],
            "score": float(score),
        }
        for box, score, label in zip(*found, strict=True)
    ]
