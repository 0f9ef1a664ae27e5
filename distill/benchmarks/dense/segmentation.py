"""Semantic segmentation with a linear probe: BatchNorm and a 1 x 1 convolution on a frozen map.

The protocols of DINOv3 and RADIO are recipes of this (`recipes/evaluation/`). mIoU is that of the
whole test set, from one confusion matrix.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field, PositiveInt, model_validator

from data.labelled.label_survey import LabelSurvey
from data.labelled.segmentation import AnySegmentation
from data.labelled.segmentation_files import PixelSample, SegmentationLayout
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.dense.class_tasks import ClassTask
from distill.benchmarks.dense.counters import ClassCounter
from distill.benchmarks.dense.dense_probe import Candidate, DenseProbe
from distill.benchmarks.dense.heads import TaskHeads
from distill.benchmarks.dense.label_pictures import draw_labels
from distill.benchmarks.dense.pixel_samples import (
    InputConfig,
    LabelledPixels,
    image_tensor,
    judge_sizes,
)
from distill.benchmarks.dense.pixel_task import PixelTask, TaskGroup
from distill.benchmarks.dense.pixel_views import PixelViews
from distill.benchmarks.dense.probe_images import ProbeImages
from distill.benchmarks.dense.probe_training import ProbeConfig
from distill.benchmarks.dense.unaugmented import without_augmentation
from teachers.teacher import Teacher
from teachers.upsamplers.resize import Size2d

_TASK = "segmentation"


class SegmentationConfig(BenchmarkConfig):
    """A linear probe on a segmentation set.

    Attributes:
        dataset: the data set and its layout.
        input: of the encoder.
        probe: how the head is trained.
        dropout: share of channels that is dropped before the head.
        loss_stride: the loss is taken at every n-th pixel along both axes.
        labels: (height, width) that test labels are resized to before they are counted; None for
            their own size. A coarser grid raises mIoU: metrics on different grids do not compare.
        batch_size: windows of a test image that are encoded at once.
    """

    kind: str = "segmentation"
    dataset: AnySegmentation
    input: InputConfig = InputConfig()
    probe: ProbeConfig
    dropout: float = Field(0.0, ge=0, lt=1)
    loss_stride: PositiveInt = 1
    labels: Size2d | None = None
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _states_its_augmentation(self) -> Self:
        without_augmentation(self, off={"scale": (1.0, 1.0), "photometric": False})
        return self


class Segmentation(DenseProbe):
    """mIoU, the accuracy of pixels, and its mean over classes, in per cent.

    The folder also gets each class's IoU.
    """

    Config: ClassVar[type[BenchmarkConfig]] = SegmentationConfig
    config: SegmentationConfig

    def tasks(self) -> Sequence[PixelTask]:
        """See `DenseProbe`."""
        reported = ("miou", "pixel_accuracy", "mean_accuracy")
        names = self.config.dataset.names
        return [ClassTask(_TASK, len(names), reported=reported, dropout=self.config.dropout)]

    def survey(self) -> Survey | None:
        """Pixels of each class; None for the embedded set, which is drawn."""
        dataset = self.config.dataset
        if not isinstance(dataset, SegmentationLayout):
            return None
        return LabelSurvey(dataset, partial(judge_sizes, self.config.input))

    def read(self, sample: PixelSample) -> LabelledPixels:
        """See `DenseProbe`."""
        image, labels = self.config.dataset.read(sample)
        return LabelledPixels(image_tensor(image), torch.tensor(labels)[None])

    def images(self, encoder: Teacher, tasks: TaskGroup) -> ProbeImages:
        """See `DenseProbe`; windows average probabilities."""
        return PixelViews(encoder, tasks, self, partial(torch.softmax, dim=1))

    def facts(self, known: torch.Tensor) -> dict[str, Any]:
        """See `DenseProbe`."""
        return {"classes": len(self.config.dataset.names)}

    def tables(self, candidates: Sequence[Candidate], best: Sequence[Candidate]) -> dict[str, Any]:
        """Each class's IoU, and the mIoU of every learning rate."""
        ious = cast(ClassCounter, best[0].counters[_TASK]).ious()
        return {
            "iou.json": dict(zip(self.config.dataset.names, ious, strict=True)),
            "miou_by_lr.json": {each.name: each.metrics[_TASK]["miou"] for each in candidates},
        }

    def draw(
        self,
        images: ProbeImages,
        group: TaskGroup,
        heads: TaskHeads,
        samples: Sequence[PixelSample],
        path: Path,
    ) -> None:
        """Draws images, labels as they are stored, predictions, and a legend of the colours."""
        rows = []
        for sample in samples:
            image, labels = self.read(sample)
            (predicted,) = images.predict([heads], image, (labels.shape[-2], labels.shape[-1]))
            rows.append((image, labels[0], predicted[0].cpu()))
        draw_labels(path, rows, self.config.dataset.names)
