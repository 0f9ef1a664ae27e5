"""The tasks of the multi-task sets: truth, loss, and figures of each.

Truth and decided predictions are float (C, H, W); truth is 255 where it is unknown, in all
channels. Losses and their weights are those published with MLoRE and InvPT, but for what
`Normals.loss` says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data.labelled.files import IGNORED
from data.labelled.multitask import MultiTaskSample, NyudLayout, PascalContextLayout
from distill.benchmarks.dense import depth_scores, normal_scores
from distill.benchmarks.dense.label_pictures import label_colours
from distill.benchmarks.dense.multitask_counters import (
    ClassCounter,
    Counter,
    SaliencyCounter,
    SumsCounter,
)
from distill.benchmarks.dense.pixel_views import cross_entropy

_WEIGHTS = {"semseg": 1.0, "parts": 2.0, "saliency": 5.0, "normals": 10.0, "depth": 1.0}
_LEAST_DEPTH = 1e-3  # metres
_FAR = 10.0  # metres, black in a picture


class PixelTask(ABC):
    """One kind of labels.

    Attributes:
        name: as in `MultiTaskSample`.
        channels: of truth.
        outputs: channels that a head predicts.
        headline: the figure that chooses among learning rates.
        lower_is_better: whether it is an error.
    """

    headline: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    channels: ClassVar[int] = 1

    def __init__(self, name: str, outputs: int = 1) -> None:
        self.name, self.outputs, self.weight = name, outputs, _WEIGHTS[name]

    def truth(self, sample: MultiTaskSample) -> Tensor:
        """The truth of an image."""
        return torch.tensor(getattr(sample, self.name)).float().view(1, *sample.image.shape[:2])

    @abstractmethod
    def loss(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The mean over known pixels, 0 without any: (B, outputs, H, W) and (B, C, H, W)."""

    @abstractmethod
    def decided(self, predicted: Tensor) -> Tensor:
        """What counts of a prediction (outputs, H, W): (C, H, W)."""

    @abstractmethod
    def counter(self, num_images: int, device: torch.device) -> Counter:
        """Counts some test images, those of all ranks together."""

    @abstractmethod
    def colours(self, maps: Tensor) -> Tensor:
        """Truth or a decided prediction as a picture (3, H, W)."""

    def adapt(self, truth: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """The values of truth that was enlarged by a ratio, and mirrored or not."""
        return truth


class Classes(PixelTask):
    """Semantic segmentation, and parts of people: cross entropy and mIoU."""

    headline = "miou"

    def loss(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Cross entropy."""
        return cross_entropy(predicted, truth[:, 0])

    def decided(self, predicted: Tensor) -> Tensor:
        """The likeliest class."""
        return predicted.argmax(0, keepdim=True).float()

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """One confusion matrix."""
        return ClassCounter(self.outputs, device)

    def colours(self, maps: Tensor) -> Tensor:
        """A colour for each class."""
        return label_colours(self.outputs)[maps[0].long()].permute(2, 0, 1) / 255


class Saliency(PixelTask):
    """Balanced binary cross entropy, and the largest F measure."""

    headline = "max_f"

    def loss(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Salient pixels weigh the share of the others, and the other way round."""
        known = truth != IGNORED
        logits, labels = predicted[known], truth[known]
        if not len(labels):
            return predicted.sum() * 0
        others = 1 - labels.mean()
        weights = torch.where(labels == 1, others, 1 - others)
        return F.binary_cross_entropy_with_logits(logits, labels, weights)

    def decided(self, predicted: Tensor) -> Tensor:
        """A probability."""
        return predicted.sigmoid()

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """Counts at every threshold."""
        return SaliencyCounter(device)

    def colours(self, maps: Tensor) -> Tensor:
        """Grey."""
        return (maps * (maps != IGNORED)).expand(3, -1, -1)


class Normals(PixelTask):
    """L1 to unit vectors, and the mean angle; the first component points right."""

    headline = "mean_angle_pooled"
    lower_is_better = True
    channels = 3

    def truth(self, sample: MultiTaskSample) -> Tensor:
        """Unit vectors; a zero vector is unknown."""
        normals = torch.tensor(sample.normals).permute(2, 0, 1)
        return torch.where((normals != 0).any(0), normals, IGNORED)

    def loss(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The mean difference of components, of the prediction as it is.

        Published code scales it to unit length first. Then the exact opposite of a vector along
        an axis is a local minimum, in which some seeds' linear probes stay.
        """
        return _l1(predicted, truth)

    def decided(self, predicted: Tensor) -> Tensor:
        """The direction."""
        return F.normalize(predicted, dim=0)

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """Angles over all pixels of all images."""

        def sums(decided: Tensor, truth: Tensor) -> Tensor:
            return normal_scores.normal_sums(decided, _zero_where_unknown(truth))

        scores = normal_scores.normal_scores
        return SumsCounter(normal_scores.NUM_SUMS, sums, scores, self.headline, num_images, device)

    def colours(self, maps: Tensor) -> Tensor:
        """Components as colours."""
        return normal_scores.normal_colours(_zero_where_unknown(maps))

    def adapt(self, truth: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """What pointed right points left in a mirror."""
        signs = truth.new_tensor([-1.0 if mirrored else 1.0, 1.0, 1.0]).view(3, 1, 1)
        return torch.where(truth == IGNORED, truth, truth * signs)


class Depth(PixelTask):
    """L1 in metres, and the RMSE over all pixels."""

    headline = "rmse_pooled"
    lower_is_better = True

    def truth(self, sample: MultiTaskSample) -> Tensor:
        """Metres; 0 is unknown."""
        depth = super().truth(sample)
        return torch.where(depth > 0, depth, IGNORED)

    def loss(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The mean difference."""
        return _l1(predicted, truth)

    def decided(self, predicted: Tensor) -> Tensor:
        """Metres above 0."""
        return predicted.clamp(min=_LEAST_DEPTH)

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """Squared errors over all pixels of all images."""

        def sums(decided: Tensor, truth: Tensor) -> Tensor:
            return depth_scores.depth_sums(decided, truth, truth != IGNORED)

        scores = depth_scores.depth_scores
        return SumsCounter(depth_scores.NUM_SUMS, sums, scores, self.headline, num_images, device)

    def colours(self, maps: Tensor) -> Tensor:
        """Near is bright, black is far or unknown."""
        return (1 - maps / _FAR).clamp(0, 1).expand(3, -1, -1)

    def adapt(self, truth: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """What looks larger is nearer by as much (Eigen et al. 2014)."""
        return torch.where(truth == IGNORED, truth, truth / ratio)


def build_tasks(layout: PascalContextLayout | NyudLayout) -> list[PixelTask]:
    """The tasks of a set, in its order."""
    others: dict[str, Callable[[str, int], PixelTask]] = {
        "saliency": Saliency,
        "normals": Normals,
        "depth": Depth,
    }
    outputs = {**layout.num_classes, "normals": Normals.channels}
    return [others.get(name, Classes)(name, outputs.get(name, 1)) for name in layout.tasks]


def _zero_where_unknown(truth: Tensor) -> Tensor:
    return torch.where(truth == IGNORED, 0.0, truth)


def _l1(predicted: Tensor, truth: Tensor) -> Tensor:
    known = truth != IGNORED
    if not known.any():
        return predicted.sum() * 0
    return (predicted[known] - truth[known]).abs().mean()
