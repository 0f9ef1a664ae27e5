"""Surface normals by a probe on a frozen encoder, as in Probe3D."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from data.errors import DataError
from data.labelled.depth import DepthSample, DepthView
from data.labelled.depth_survey import DepthSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.dense.geometry import GeometryConfig, GeometryProbe
from distill.benchmarks.dense.heads import build_head
from distill.benchmarks.dense.normal_scores import (
    NUM_SUMS,
    normal_colours,
    normal_scores,
    normal_sums,
    normals_of_depth,
)
from distill.benchmarks.dense.pixel_task import PixelTask, RegressionTask

_KAPPA_LEAST = 0.01
_NEAR_ONE = 1 - 1e-6  # largest cosine whose arc cosine has a finite slope


class NormalsConfig(GeometryConfig):
    """A probe of surface normals.

    A set without files of normals needs depth and a focal length, which they are computed from.

    Attributes:
        step: reach of the differences of depth in pixels, see `normals_of_depth`.
    """

    kind: str = "normals"
    step: PositiveInt = 1


def angular_loss(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Negative log likelihood of angles with a predicted spread (Bae et al. 2021, equation 5).

    Args:
        prediction: (B, 4, ...): a vector of any length, and its certainty before the ELU.
        truth: (B, 3, ...) unit vectors where they are known.
        known: bool (B, ...).
    """
    if not known.any():
        return prediction.sum() * 0
    vectors = F.normalize(prediction[:, :3], dim=1)
    cosine = (vectors * truth).sum(1)[known].clamp(-_NEAR_ONE, _NEAR_ONE)
    kappa = F.elu(prediction[:, 3][known]) + 1 + _KAPPA_LEAST
    spread = -(kappa.square() + 1).log() + (1 + (-kappa * math.pi).exp()).log()
    return (spread + kappa * cosine.acos()).mean()


class NormalsTask(RegressionTask):
    """Surface normals, trained with L1; the first component points right."""

    headline = "mean_angle_pooled"
    channels = 3
    num_sums = NUM_SUMS

    def decode(self, predicted: Tensor) -> Tensor:
        """The vector, of unit length."""
        return F.normalize(predicted[..., :3, :, :], dim=-3)

    def sums(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """See `normal_sums`."""
        return normal_sums(predicted, truth)

    def scores(self, sums: Tensor) -> dict[str, float]:
        """See `normal_scores`."""
        return normal_scores(sums)

    def adapt(self, maps: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """In a mirror, what points right points left."""
        return maps * maps.new_tensor([-1.0 if mirrored else 1.0, 1.0, 1.0]).view(3, 1, 1)

    def colours(self, maps: Tensor, truth: Tensor) -> Tensor:
        """See `normal_colours`."""
        return normal_colours(maps)


class AngularNormalsTask(NormalsTask):
    """Normals as Probe3D predicts them: a vector and its certainty, trained by `angular_loss`.

    Args:
        config: of the probe.
    """

    headline = "mean_angle_per_image"

    def __init__(self, config: NormalsConfig) -> None:
        super().__init__("normals", 4)
        self._head = config.head

    def build(self, dims: Sequence[int]) -> nn.Module:
        """The head of the recipe."""
        return build_head(self._head, dims, self.outputs)

    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """See `angular_loss`."""
        return angular_loss(predicted, truth, self.known(truth))


class Normals(GeometryProbe):
    """Unit normals from one image; angles per image and pooled."""

    Config: ClassVar[type[BenchmarkConfig]] = NormalsConfig
    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        f"{prefix}{error}_{how}"
        for prefix in ("", "mean_map_")
        for error in ("mean_angle", "rmse_angle")
        for how in ("per_image", "pooled")
    )
    config: NormalsConfig

    def tasks(self) -> Sequence[PixelTask]:
        """See `DenseProbe`."""
        return [AngularNormalsTask(self.config)]

    def survey(self) -> Survey:
        """Known normals, or depths that they are computed from.

        Raises:
            DataError: there is neither a file of normals nor a focal length.
        """
        for sample in self.config.dataset.samples("train")[:1]:
            if sample.normals is None and sample.focal_px is None:
                raise _without_focal(sample)
        return DepthSurvey(self.config.dataset, None, self.judge_sizes)

    def truth(self, view: DepthView, sample: DepthSample) -> Tensor:
        """Normals (3, H, W), of a file or computed from depth.

        Raises:
            DataError: there is neither a file of normals nor a focal length.
        """
        if view.normals is not None:
            return torch.tensor(view.normals).permute(2, 0, 1)
        if view.focal_px is None:
            raise _without_focal(sample)
        depth = torch.tensor(view.depth)
        return normals_of_depth(depth, view.focal_px, view.centre, self.config.step)


def _without_focal(sample: DepthSample) -> DataError:
    return DataError(
        f"'{sample.key}' has no normals, and no focal length to compute them with; set "
        "dataset.normals or dataset.focal_px"
    )
