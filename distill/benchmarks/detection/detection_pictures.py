"""Pictures of detections: the true objects on the left, as many of the best detections beside."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.labelled.detection import DetectionSet, place_on_canvas, read_annotated
from distill.benchmarks.detection.average_precision import Detections
from distill.display.text import picture_text

_PANEL = (320, 320)  # (height, width) in pixels
_IMAGES = 6
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def draw_detections(path: Path, truth: DetectionSet, found: Sequence[Detections]) -> None:
    """Draws one row for each of the first images with objects.

    Args:
        path: the PNG to write.
        truth: the annotated images; crowds are not drawn.
        found: in each image.
    """
    rows: list[np.ndarray] = []
    for image, detections in zip(truth.images, found, strict=True):
        solid = ~image.objects.crowds
        if not solid.any() or len(rows) == _IMAGES:
            continue
        best = np.argsort(-detections.scores, kind="stable")[: solid.sum()]
        pixels, placement = place_on_canvas(read_annotated(image), _PANEL, flipped=False)
        panels = []
        for boxes, labels, scores in (
            (image.objects.boxes[solid], image.objects.labels[solid], None),
            (detections.boxes[best], detections.labels[best], detections.scores[best]),
        ):
            names = [picture_text(truth.classes[label], 30) for label in labels]
            if scores is not None:
                names = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
            panels.append(_panel(pixels, placement.to_canvas(boxes), labels, names))
        rows.append(np.concatenate(panels, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def _panel(
    pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for box, label, name in zip(boxes, labels, names, strict=True):
        colour = _COLOURS[label % len(_COLOURS)]
        draw.rectangle(tuple(box), outline=colour, width=2)
        draw.text((box[0] + 3, box[1] + 1), name, fill=colour)
    return np.asarray(picture)
