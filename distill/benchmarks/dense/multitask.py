"""Multi-task Pascal Context and NYUDv2: a linear probe for each task, all on one frozen map.

Data, losses (except that of normals), their weights and the size of the input are those of MLoRE
(Yang et al. 2024, arXiv 2403.17749) and InvPT (Ye and Xu 2022, arXiv 2203.07997). The probes are
BatchNorm and a 1 x 1 convolution for each task, where those train a large decoder: metrics compare
with those of this benchmark only. Two differences from MLoRE's code: the F measure is that of
probabilities, whose sigmoid MLoRE takes once more; and normals are trained on the predicted vector
as it is, which MLoRE scales to unit length first. Then the exact opposite of a vector along an axis
is a local minimum, in which linear probes with some seeds stay.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from data.labelled.multitask import MultiTaskLayout
from data.labelled.multitask_survey import MultiTaskSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.dense.class_tasks import ClassTask, SaliencyTask
from distill.benchmarks.dense.dense_probe import Candidate, DenseProbe
from distill.benchmarks.dense.depth import DepthTask
from distill.benchmarks.dense.normals import NormalsTask
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

_WEIGHTS = {"semseg": 1.0, "parts": 2.0, "saliency": 5.0, "normals": 10.0, "depth": 1.0}


class MultiTaskConfig(BenchmarkConfig):
    """Linear probes of all tasks of a set.

    Attributes:
        dataset: the data set and its layout.
        input: of the encoder. A test image smaller than `crop` is padded to it where `stride` is
            given.
        probe: how the heads are trained. They share only the map, so the published weights of
            their losses count for `sgd` and `clip` only.
        loss_stride: losses are taken at every n-th pixel along both axes.
        batch_size: windows of a test image that are encoded at once.
    """

    labels: ClassVar[None] = None  # the truth is counted as it is labelled

    kind: str = "multitask"
    dataset: MultiTaskLayout
    input: InputConfig = InputConfig()
    probe: ProbeConfig
    loss_stride: PositiveInt = 1
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _states_its_augmentation(self) -> Self:
        without_augmentation(self, off={"scale": (1.0, 1.0), "photometric": False})
        return self


class MultiTask(DenseProbe):
    """Probes of all tasks of a set, trained at once.

    Metrics: `semseg_miou`, `parts_miou` and `saliency_max_f` in per cent,
    `normals_mean_angle_pooled` in degrees and `depth_rmse_pooled` in metres, as far as the set has
    the tasks. mIoU leaves out classes that neither occur nor are predicted; `*_absent_as_0` counts
    them, as is published.
    """

    Config: ClassVar[type[BenchmarkConfig]] = MultiTaskConfig
    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        {"normals_mean_angle_pooled", "depth_rmse_pooled"}
    )
    config: MultiTaskConfig

    def tasks(self) -> Sequence[PixelTask]:
        """See `DenseProbe`."""
        return build_tasks(self.config.dataset)

    def survey(self) -> Survey:
        """What is known of each task."""
        return MultiTaskSurvey(self.config.dataset, partial(judge_sizes, self.config.input))

    def read(self, sample: str) -> LabelledPixels:
        """See `DenseProbe`."""
        view = self.config.dataset.read(sample)
        truth = torch.cat([_channels(getattr(view, name)) for name in self.config.dataset.tasks])
        return LabelledPixels(image_tensor(view.image), truth)

    def images(self, encoder: Teacher, tasks: TaskGroup) -> ProbeImages:
        """See `DenseProbe`; windows average predictions before they are decoded."""
        return PixelViews(encoder, tasks, self, lambda predicted: predicted)

    def facts(self, known: Tensor) -> dict[str, Any]:
        """See `DenseProbe`."""
        tasks = self.config.dataset.tasks
        return {"counted_pixels": dict(zip(tasks, known.sum(0).tolist(), strict=True))}

    def tables(self, candidates: Sequence[Candidate], best: Sequence[Candidate]) -> dict[str, Any]:
        """The metrics of every learning rate."""
        return {"figures.json": {each.name: each.metrics for each in candidates}}


def build_tasks(layout: MultiTaskLayout) -> list[PixelTask]:
    """The tasks of a set, in its order."""
    kinds: dict[str, tuple[type[PixelTask], int, tuple[str, ...]]] = {
        "saliency": (SaliencyTask, 1, ("max_f",)),
        "normals": (NormalsTask, 3, ("mean_angle_pooled",)),
        "depth": (DepthTask, 1, ("rmse_pooled",)),
    }
    tasks = []
    for name in layout.tasks:
        classes = ClassTask, layout.num_classes.get(name, 0), ("miou", "miou_absent_as_0")
        kind, outputs, reported = kinds.get(name, classes)
        tasks.append(kind(name, outputs, _WEIGHTS[name], reported))
    return tasks


def _channels(labels: np.ndarray) -> Tensor:
    """Labels (H, W) or (H, W, C) as float32 (C, H, W)."""
    values = torch.tensor(labels).float()
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)
