"""Agreement of a student's heads with their teachers on held-out images."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from data.batch import scale_pixels
from data.errors import DataError
from data.labelled.image_surveys import ImagesSurvey
from distill.objective.losses import match_grids
from distill.runtime.errors import RecipeError
from distill.targets.source import LiveTargets
from teachers.config import StrictConfig
from teachers.features import Features
from teachers.upsamplers.resize import Size2d

# The relative rounding error of float32 is up to 2^-24; a fidelity above the inverse square of that
# would only measure rounding.
MAX_FIDELITY = 2.0**48


class EvaluationConfig(StrictConfig):
    """The images that `distill.evaluate` measures a student on.

    Attributes:
        images: a folder, archive or shards of images that the run does not train on.
        resolutions: of the student's input in pixels, each one number or [height, width].
        batch_size: images of one forward pass.
    """

    images: Path
    resolutions: list[Size2d] = Field(min_length=1)
    batch_size: PositiveInt = 8


class Agreement(NamedTuple):
    """One student head against one teacher.

    Attributes:
        fidelity: variance of the teacher's map divided by the mean squared error, both over cells
            and channels of these images: 1 for the best constant prediction. At most MAX_FIDELITY,
            also for an error of 0, so that the value is a number in JSON.
        spatial_cosine: mean over cells, in [-1, 1].
        summary_cosine: mean over images; None where the teacher has no summary.
        spatial_mse: mean squared error over cells and channels.
    """

    fidelity: float
    spatial_cosine: float
    summary_cosine: float | None
    spatial_mse: float


class AgreementPass:
    """Accumulates the agreement of one head with one teacher over batches, in float64.

    Maps are compared in the space of the head's training (PHI-S, if the run has it), on the smaller
    of their two grids. The variance is that of the compared cells, as in RADIO's own diagnostic;
    PHI-S sets only the variance over the training images to 1.
    """

    def __init__(self) -> None:
        self._cells = self._images = 0
        self._error = self._cosine = self._summary = 0.0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._has_summary = True

    def update(self, head: Features, target: Features) -> None:
        """Adds a batch: summaries (B, D_summary) or None, maps (B, D, h, w) and (B, D, h', w')."""
        prediction, wanted = match_grids(head.spatial.float(), target.spatial.float())
        s, t = (x.double().permute(0, 2, 3, 1).flatten(0, 2) for x in (prediction, wanted))
        self._cells += len(t)
        self._error += float((s - t).square().mean(1).sum())
        self._cosine += float(F.cosine_similarity(s, t, dim=1).sum())
        self._sum, self._squares = self._sum + t.sum(0), self._squares + t.square().sum(0)
        self._images += len(head.spatial)
        if head.summary is None or target.summary is None:
            self._has_summary = False
        else:
            a, b = head.summary.double(), target.summary.double()
            self._summary += float(F.cosine_similarity(a, b, dim=1).sum())

    def finish(self) -> Agreement:
        """The agreement over all batches.

        Raises:
            RuntimeError: there was no batch, or the maps are not finite.
        """
        if not self._cells:
            raise RuntimeError("agreement: there are no images")
        if not math.isfinite(self._error):
            raise RuntimeError("agreement: the maps are not finite")
        mean = torch.as_tensor(self._sum) / self._cells
        variance = float((torch.as_tensor(self._squares) / self._cells - mean.square()).mean())
        error = self._error / self._cells
        return Agreement(
            min(variance / error, MAX_FIDELITY) if error else MAX_FIDELITY,
            self._cosine / self._cells,
            self._summary / self._images if self._has_summary else None,
            error,
        )


@torch.no_grad()
def measure(
    students: Mapping[str, nn.Module], targets: LiveTargets, images: Tensor, batch_size: int
) -> dict[str, dict[str, Agreement]]:
    """Measures students against all teachers; the teachers run once.

    Args:
        students: name to a student in eval mode.
        targets: of the teachers, with the statistics of the students' training.
        images: uint8 (N, 3, H, W).
        batch_size: images of one forward pass.

    Returns:
        Teacher name to student name to agreement.
    """
    passes = {t: {s: AgreementPass() for s in students} for t in targets.ensemble.teachers}
    device = next(next(iter(students.values())).parameters()).device
    for batch in images.split(batch_size):
        pixels = scale_pixels(batch, device)
        wanted = targets(pixels)
        for name, student in students.items():
            heads = student(pixels).heads
            for teacher, target in wanted.items():
                passes[teacher][name].update(heads[teacher], target)
    return {t: {s: each.finish() for s, each in row.items()} for t, row in passes.items()}


def require_images(source: Path) -> None:
    """Lists the images and decodes the first, before teachers are built, which may take minutes.

    Raises:
        RecipeError: there is no such file or folder.
        DataError: it has no image, or the first cannot be read.
    """
    if not source.exists():
        raise RecipeError(
            f"evaluation.images: there is no {source.absolute()}; set it to a folder, "
            "archive or shards of images that the run does not train on"
        )
    try:
        ImagesSurvey(source)
    except DataError as error:
        raise DataError(f"evaluation.images: {error}") from error
