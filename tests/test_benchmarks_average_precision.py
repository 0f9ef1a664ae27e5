"""COCO's AP, against hand-computed cases."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.labelled.detection import AnnotatedImage, DetectionSet, Objects
from distill.benchmarks.detection.average_precision import (
    Detections,
    average_precision,
    require_coco_eval,
)
from distill.runtime.errors import RecipeError

SMALL, MEDIUM, LARGE = [0, 0, 20, 20], [100, 0, 150, 50], [200, 0, 320, 120]
Mark = tuple[list[float] | list[int], int]


def truth(*images: list[Mark], crowds: dict[int, list[int]] | None = None) -> DetectionSet:
    """Images of boxes and labels of two classes; `crowds` are marks by image that are crowds."""
    marked = []
    for number, marks in enumerate(images):
        boxes = np.array([box for box, _ in marks], float).reshape(-1, 4)
        crowd = np.zeros(len(marks), bool)
        crowd[(crowds or {}).get(number, [])] = True
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        labels = np.array([label for _, label in marks], int)
        marked.append(
            AnnotatedImage(Path(f"{number}.jpg"), (480, 640), Objects(boxes, labels, areas, crowd))
        )
    return DetectionSet(("cat", "dog"), tuple(marked))


def found(*detections: tuple[list[float] | list[int], int, float]) -> Detections:
    return Detections(
        np.array([box for box, _, _ in detections], float).reshape(-1, 4),
        np.array([score for _, _, score in detections]),
        np.array([label for _, label, _ in detections], int),
    )


def as_found(data: DetectionSet) -> list[Detections]:
    """The ground truth, said with little confidence."""
    return [
        Detections(i.objects.boxes, np.full(len(i.objects.labels), 0.1), i.objects.labels)
        for i in data.images
    ]


def test_the_truth_has_ap_100_at_every_size() -> None:
    data = truth([(SMALL, 0), (LARGE, 1)], [], [(MEDIUM, 1)])
    figures = average_precision(data, as_found(data))
    assert list(figures) == ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    assert list(figures.values()) == pytest.approx([100] * 6)


def test_nothing_found_is_zero_and_absent_sizes_are_left_out() -> None:
    data = truth([(SMALL, 0)], [])
    figures = average_precision(data, [found(), found()])
    assert figures == {"ap": 0, "ap50": 0, "ap75": 0, "ap_small": 0}


def test_ap_is_the_hand_computed_one() -> None:
    """Two cats. Best score: a miss; second: one of them, at IoU 0.64; the other is not found.

    Up to IoU 0.60 (three of ten thresholds) precision is 1/2 up to recall 1/2, which is 51 of
    COCO's 101 points: AP 51/202 there, and 0 above.
    """
    data = truth([(MEDIUM, 0), (LARGE, 0)])
    partly = [100, 0, 132, 50]  # 32 of 50 columns
    figures = average_precision(data, [found(([400, 300, 450, 350], 0, 0.9), (partly, 0, 0.8))])
    assert figures["ap50"] == pytest.approx(100 * 51 / 202)
    assert figures["ap75"] == 0
    assert figures["ap"] == pytest.approx(100 * 51 / 202 * 3 / 10)


def test_ap_is_the_mean_over_classes_that_occur() -> None:
    data = truth([(MEDIUM, 0), (LARGE, 1)])
    assert average_precision(data, [found((MEDIUM, 0, 0.5))])["ap"] == pytest.approx(50)
    only_cats = truth([(MEDIUM, 0)])
    wrong_class = [found((MEDIUM, 0, 0.5), (LARGE, 1, 0.9))]
    assert average_precision(only_cats, wrong_class)["ap"] == pytest.approx(100)


def test_sizes_are_those_of_the_marked_area() -> None:
    data = truth([(MEDIUM, 0)])
    thin = data.images[0].objects._replace(areas=np.array([300.0]))
    data = DetectionSet(data.classes, (data.images[0]._replace(objects=thin),))
    assert set(average_precision(data, [found()])) == {"ap", "ap50", "ap75", "ap_small"}


def test_a_detection_on_a_crowd_counts_neither_way() -> None:
    crowd = [300, 200, 500, 400]
    data = truth([(MEDIUM, 0), (crowd, 0)], crowds={0: [1]})
    on_it = [
        found((MEDIUM, 0, 0.5), ([310, 210, 360, 260], 0, 0.9), ([320, 220, 350, 250], 0, 0.8))
    ]
    assert average_precision(data, on_it)["ap"] == pytest.approx(100)
    no_crowd = truth([(MEDIUM, 0)])
    assert average_precision(no_crowd, on_it)["ap"] == pytest.approx(100 / 3)


def test_only_the_best_hundred_detections_of_an_image_count() -> None:
    data = truth([(MEDIUM, 0)])
    misses = [([400, i, 410, i + 5], 1, 0.9) for i in range(100)]
    assert average_precision(data, [found((MEDIUM, 0, 0.5), *misses)])["ap"] == pytest.approx(100)
    # COCO counts the hundred of each class apart.
    misses = [(box, 0, score) for box, _, score in misses]
    assert average_precision(data, [found((MEDIUM, 0, 0.5), *misses)])["ap"] == 0


def test_a_set_without_objects_has_no_ap() -> None:
    crowd_only = truth([(LARGE, 0)], crowds={0: [0]})
    for data in (truth([]), crowd_only):
        with pytest.raises(DataError, match="the test images have no object"):
            average_precision(data, [found()])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install faster-coco-eval.*\[detection\]"):
        require_coco_eval()
