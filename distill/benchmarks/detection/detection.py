"""COCO detection on frozen features: AP of a detector that is trained on them.

The protocol is our own and small: a simple pyramid and FCOS, flips only, images letterboxed to the
encoder's size. Rows are comparable with each other, with and without an upsampler, but not with
table 1 of FeatSharp (arXiv 2502.16025), which has another detector.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import PositiveInt
from torchvision.models.detection import FCOS

from data.errors import DataError
from data.labelled.detection import CocoLayout, DetectionSet
from data.labelled.detection_survey import DetectionSurvey
from data.labelled.survey import Survey
from data.read_ahead import read_ahead
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.detection.average_precision import (
    MAX_DETECTIONS,
    Detections,
    average_precision,
    require_coco_eval,
)
from distill.benchmarks.detection.detection_pictures import draw_detections
from distill.benchmarks.detection.detection_training import (
    DetectorTrainingConfig,
    fit_image,
    stack_pixels,
    train_detector,
)
from distill.benchmarks.detection.detector import NMS_THRESHOLD, SCORE_THRESHOLD
from distill.benchmarks.sharing import gather_shares, own_share
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.runtime.progress import tracked
from teachers.errors import TeacherError
from teachers.teacher import Teacher


class DetectionConfig(BenchmarkConfig, DetectorTrainingConfig):
    """Data and training of the detector. The defaults are twelve epochs of COCO.

    Attributes:
        dataset: images and boxes.
        size: (height, width) in pixels of the canvas that images are fitted into; None for the
            encoder's own resolution.
    """

    kind: str = "detection"
    dataset: CocoLayout
    size: tuple[PositiveInt, PositiveInt] | None = None


class Detection(Benchmark):
    """Trains an FCOS on the encoder's map and measures AP on the test images."""

    Config: ClassVar[type[BenchmarkConfig]] = DetectionConfig

    config: DetectionConfig

    def survey(self) -> Survey:
        """Boxes of each class."""
        return DetectionSurvey(self.config.dataset)

    def check(self, encoder: Teacher) -> None:
        """Checks the size of the canvas; see `Benchmark.check`.

        Raises:
            RecipeError: faster-coco-eval is not installed, or there are more ranks than images of a
                batch.
        """
        require_coco_eval()
        if self.config.batch_size < distributed.world_size():
            raise RecipeError(
                f"batch_size: expected at least one image for each of {distributed.world_size()} "
                f"ranks, got {self.config.batch_size}"
            )
        _canvas(encoder, self.config.size)

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Trains, detects and computes AP; see `Benchmark.measure` and `check`."""
        self.check(encoder)
        size = _canvas(encoder, self.config.size)
        train, test = (self.config.dataset.load(split) for split in ("train", "test"))
        if train.classes != test.classes:
            raise DataError(
                f"{self.config.dataset.root}: training and test images have different classes"
            )
        detector = train_detector(encoder, train, size, self.config, seed)
        found = self._detect(detector, test, size)
        metrics = average_precision(test, found)
        if distributed.rank() == 0:
            draw_detections(folder / "detections.png", test, found)
        return Measurement(metrics, self._protocol(train, test, size, detector))

    @torch.no_grad()
    def _detect(
        self, detector: FCOS, test: DetectionSet, size: tuple[int, int]
    ) -> list[Detections]:
        """The detections in each test image, on every rank."""
        detector.eval()
        own = own_share(len(test.images))
        a_pass = -(-self.config.batch_size // distributed.world_size())
        fitted = read_ahead(lambda i: fit_image(test.images[i], size, flipped=False), own)
        rows = torch.full((len(own), MAX_DETECTIONS, 6), -1.0, dtype=torch.float64)
        for start in tracked(range(0, len(own), a_pass), "detecting"):
            batch = [next(fitted) for _ in own[start : start + a_pass]]
            outputs = detector(list(stack_pixels(batch)))
            for row, image, output in zip(rows[start:], batch, outputs, strict=False):
                boxes = image.placement.to_image(output["boxes"].double().cpu().numpy())
                count = len(boxes)
                row[:count, :4] = torch.from_numpy(boxes)
                row[:count, 4] = output["scores"]
                row[:count, 5] = output["labels"]
        gathered = gather_shares(rows.to(distributed.device()), len(test.images)).cpu().numpy()
        real = (image[image[:, 5] >= 0] for image in gathered)
        return [Detections(r[:, :4], r[:, 4], r[:, 5].astype(np.int64)) for r in real]

    def _protocol(
        self, train: DetectionSet, test: DetectionSet, size: tuple[int, int], detector: FCOS
    ) -> dict[str, Any]:
        own = detector.backbone.encoder.strides
        pyramid = f"the encoder's layers of strides {own}" if own else "a simple pyramid"
        return {
            "train_images": len(train.images),
            "test_images": len(test.images),
            "test_objects": int(sum((~image.objects.crowds).sum() for image in test.images)),
            "classes": len(train.classes),
            "passes": self.config.steps * self.config.batch_size / len(train.images),
            "size": list(size),
            "fit": "aspect kept, padded right and below",
            "grid": list(detector.backbone.encoder.spec.grid(*size)),
            "cells_px": [list(cell) for cell in detector.anchor_generator.cells],
            "detector": f"FCOS on {pyramid}, encoder frozen",
            "trained_parameters": sum(p.numel() for p in detector.parameters() if p.requires_grad),
            "score_threshold": SCORE_THRESHOLD,
            "nms_threshold": NMS_THRESHOLD,
            "detections": MAX_DETECTIONS,
        }


def _canvas(encoder: Teacher, size: tuple[int, int] | None) -> tuple[int, int]:
    size = encoder.spec.resolution if size is None else size
    try:
        encoder.spec.grid(*size)
    except ValueError as error:
        raise TeacherError(f"size: {error}") from None
    return size
