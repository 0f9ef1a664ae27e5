"""Monocular depth by a probe on a frozen encoder, as in DINOv2, DINOv3 and Probe3D."""

import math
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from data.labelled.depth import DepthSample, DepthView
from data.labelled.depth_survey import DepthSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.dense.depth_scores import (
    ERRORS,
    NUM_SUMS,
    aligned,
    depth_scores,
    depth_sums,
)
from distill.benchmarks.dense.geometry import GeometryConfig, GeometryProbe
from distill.benchmarks.dense.heads import build_head
from distill.benchmarks.dense.pixel_task import PixelTask, RegressionTask

_MEAN_ONLY_STEPS = 100  # of SigLoss
_MEAN_SHARE = 0.15  # lambda is one minus it (Eigen et al. 2014; AdaBins)
_SCALES = 4  # of `gradient_loss`
_EPS = 1e-3  # metres; keeps logarithms finite


def sig_loss(prediction: Tensor, truth: Tensor, known: Tensor, step: int) -> Tensor:
    """SigLoss, the scale-invariant logarithmic error (Eigen et al. 2014; AdaBins), as in DINOv2.

    With g = log prediction - log truth: sqrt(var(g) + 0.15 mean(g)^2). The first 100 steps have
    only the second term, which brings the predictions to the right scale.

    Args:
        prediction: metres, of any shape.
        truth: metres where it is known, of the same shape.
        known: bool, of the same shape.
        step: 0-based step of the training.
    """
    if not known.any():
        return prediction.sum() * 0
    g = _log(prediction[known]) - _log(truth[known])
    total = _MEAN_SHARE * g.mean().square()
    if step >= _MEAN_ONLY_STEPS:
        total = total + g.var(correction=0)
    return (total + 1e-12).sqrt()  # the slope of a root is infinite at 0


def gradient_loss(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """The multi-scale gradient term of MegaDepth (Li and Snavely 2018, arXiv 1804.00607).

    Probe3D adds it to SigLoss for sharp edges. With g = log prediction - log truth, it is the sum
    of |g - g'| over known neighbours along both axes, divided by the number of known pixels, and
    added up over four scales, of every 1st, 2nd, 4th and 8th pixel.

    Args:
        prediction: metres, (..., H, W).
        truth: metres where it is known, of the same shape.
        known: bool, of the same shape.
    """
    # Unknown depths are set to 1 before the logarithm, whose gradient could be NaN there.
    g = _log(prediction.where(known, 1.0)) - _log(truth.where(known, 1.0))
    total = prediction.sum() * 0
    for scale in range(_SCALES):
        places = (..., slice(None, None, 2**scale), slice(None, None, 2**scale))
        part, counts = g[places], known[places]
        steps = [(part.diff(dim=axis).abs() * _pairs(counts, axis)).sum() for axis in (-2, -1)]
        total = total + sum(steps) / counts.sum().clamp(min=1)
    return total


def _log(depth: Tensor) -> Tensor:
    return (depth + _EPS).log()


def _pairs(known: Tensor, axis: int) -> Tensor:
    """Where both a pixel and the next one along an axis are known."""
    length = known.shape[axis]
    return known.narrow(axis, 1, length - 1) & known.narrow(axis, 0, length - 1)


_LEAST = 0.1  # of a bin's weight


class DepthConfig(GeometryConfig):
    """A probe of depth.

    Attributes:
        bins: of depth, in equal steps over the whole range.
        depth_range: in metres; truth outside is unknown, predictions are clamped to it.
        gradient_weight: of `gradient_loss` beside SigLoss, on the pixels of `loss_stride`. Probe3D
            weighs them 0.5 and 10: 0.05 here, as AdamW without decay ignores a common factor.
    """

    kind: str = "depth"
    bins: PositiveInt = 256
    depth_range: tuple[PositiveFloat, PositiveFloat] = (0.001, 10.0)
    gradient_weight: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.depth_range[0] >= self.depth_range[1]:
            raise ValueError(f"depth_range: {list(self.depth_range)} does not rise")
        return self


class BinnedDepth(nn.Module):
    """Depth as the mean of bins, weighted by a head (AdaBins, linear norm).

    Args:
        head: maps to (B, bins, h, w).
        bins: how many.
        depth_range: of the first and the last, in metres.
    """

    centres: Tensor

    def __init__(self, head: nn.Module, bins: int, depth_range: tuple[float, float]) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("centres", torch.linspace(*depth_range, bins).view(1, -1, 1, 1))

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps to depth (B, 1, h, w) in metres."""
        weights = self.head(*maps).relu() + _LEAST
        return (weights * self.centres).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


class DepthTask(RegressionTask):
    """Depth in metres, trained with L1; the metrics are those of `depth_scores`."""

    headline = "rmse_pooled"
    num_sums = NUM_SUMS
    depth_range: tuple[float, float] = (_EPS, math.inf)  # of decoded predictions

    def decode(self, predicted: Tensor) -> Tensor:
        """Clamped to the range."""
        return predicted.clamp(*self.depth_range)

    def sums(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """See `depth_sums`."""
        return depth_sums(predicted, truth, truth > 0)

    def scores(self, sums: Tensor) -> dict[str, float]:
        """See `depth_scores`."""
        return depth_scores(sums)

    def adapt(self, maps: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """What looks larger is nearer by the same ratio (Eigen et al. 2014, section 3.4)."""
        return maps / ratio

    def colours(self, maps: Tensor, truth: Tensor) -> Tensor:
        """Near is bright, black is unknown."""
        import matplotlib

        known = truth[truth > 0]
        if not len(known):
            known = maps.new_tensor(self.depth_range)
        near, far = known.min(), known.quantile(0.98)
        shade = 1 - ((maps[0] - near) / (far - near).clamp(min=1e-6)).clamp(0, 1)
        rgb = torch.tensor(matplotlib.colormaps["magma"](shade.numpy())[..., :3])
        return (rgb.permute(2, 0, 1) * (maps > 0)).float()


class BinnedDepthTask(DepthTask):
    """Depth as DINOv2 and Probe3D predict it: bins, SigLoss, metrics also of aligned predictions.

    Args:
        config: of the probe.
    """

    headline = "rmse_per_image"
    num_sums = 2 * NUM_SUMS

    def __init__(self, config: DepthConfig) -> None:
        super().__init__("depth")
        self._config, self.depth_range = config, config.depth_range

    def build(self, dims: Sequence[int]) -> nn.Module:
        """Bins on the head of the recipe."""
        bins = self._config.bins
        return BinnedDepth(build_head(self._config.head, dims, bins), bins, self.depth_range)

    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """SigLoss, and `gradient_loss` where it has a weight."""
        total = sig_loss(predicted, truth, truth > 0, step)
        if not self._config.gradient_weight:
            return total
        return total + self._config.gradient_weight * gradient_loss(predicted, truth, truth > 0)

    def sums(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Those of the prediction and of the aligned one."""
        known = truth > 0
        fitted = aligned(predicted, truth, known).clamp(*self.depth_range)
        return torch.cat([depth_sums(each, truth, known) for each in (predicted, fitted)])

    def scores(self, sums: Tensor) -> dict[str, float]:
        """All metrics of both."""
        fitted = depth_scores(sums[:, NUM_SUMS:])
        plain = depth_scores(sums[:, :NUM_SUMS])
        return plain | {f"aligned_{name}": value for name, value in fitted.items()}


class Depth(GeometryProbe):
    """Depth in metres from one image; metrics per image and pooled, plain and aligned."""

    Config: ClassVar[type[BenchmarkConfig]] = DepthConfig
    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        f"{prefix}{error}_{how}"
        for prefix in ("", "aligned_", "mean_map_")
        for error in ERRORS
        for how in ("per_image", "pooled")
    )
    config: DepthConfig

    def tasks(self) -> Sequence[PixelTask]:
        """See `DenseProbe`."""
        return [BinnedDepthTask(self.config)]

    def survey(self) -> Survey:
        """Known depths, and whether they lie in the range."""
        return DepthSurvey(self.config.dataset, self.config.depth_range, self.judge_sizes)

    def truth(self, view: DepthView, sample: DepthSample) -> Tensor:
        """Depth (1, H, W), 0 outside of the range."""
        depth = torch.tensor(view.depth)[None]
        low, high = self.config.depth_range
        return depth * ((depth >= low) & (depth <= high))
