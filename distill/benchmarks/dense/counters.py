"""Counters: they accumulate the metrics of a dense task over the test images of all ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.classification import BinaryPrecisionRecallCurve

from data.labelled.files import IGNORED
from distill.benchmarks.dense.confusion import (
    class_ious,
    confusion_matrix,
    miou_absent_as_0,
    segmentation_scores,
)
from distill.benchmarks.sharing import gather_shares
from distill.runtime import distributed

THRESHOLDS = 255


class MaxF:
    """The largest F1 over 255 thresholds between 0 and 1, pooled over pixels, not over images.

    torchmetrics counts and, in `compute`, adds the counts of all ranks, so every rank has to call
    it. torchmetrics takes values outside [0, 1] for logits. They are refused here, because a batch
    of logits that happen to lie in [0, 1] would be taken for probabilities.

    Args:
        device: where the counts are kept.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        curve = BinaryPrecisionRecallCurve(thresholds=THRESHOLDS, ignore_index=IGNORED)
        self._curve = curve.to(device) if device is not None else curve

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds pixels.

        Args:
            probabilities: float in [0, 1], of any shape.
            labels: integers of the same shape: 1 salient, 0 not, 255 ignored.

        Raises:
            ValueError: a probability is not in [0, 1].
        """
        low, high = probabilities.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"saliency: expected probabilities in [0, 1], got {float(low):g} to {float(high):g}"
            )
        self._curve.update(probabilities, labels.long())

    def compute(self) -> float:
        """The largest F1 in per cent; 0 where no pixel is salient."""
        # torchmetrics has NaN for the precision where nothing is predicted: no hit, F is 0.
        precision, recall = (c.double().nan_to_num(0) for c in self._curve.compute()[:2])
        scores = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return 100 * float(scores.max())


class Counter(ABC):
    """Accumulates the test images of this rank."""

    @abstractmethod
    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Adds one image: decoded prediction and truth, both (C, H, W), on the counter's device."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The metrics over the images of all ranks; every rank calls this."""


class ClassCounter(Counter):
    """One confusion matrix of all images.

    Args:
        num_classes: K.
        device: of the matrix.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """See `Counter`."""
        self._matrix += confusion_matrix(predicted[0].long(), truth[0], len(self._matrix))

    def metrics(self) -> dict[str, float]:
        """Those of `segmentation_scores`, and the mean IoU that counts absent classes as 0."""
        matrix = self._everywhere()
        return segmentation_scores(matrix) | {"miou_absent_as_0": miou_absent_as_0(matrix)}

    def ious(self) -> list[float | None]:
        """The IoU in per cent of each class, None without a union; every rank calls this."""
        return class_ious(self._everywhere())

    def _everywhere(self) -> Tensor:
        return distributed.all_reduce(self._matrix.clone()).cpu()


class SaliencyCounter(Counter):
    """The largest F measure.

    Args:
        device: of the counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._curve = MaxF(device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """See `Counter`."""
        self._curve.update(predicted, truth)

    def metrics(self) -> dict[str, float]:
        """See `Counter`."""
        return {"max_f": self._curve.compute()}


class SumsCounter(Counter):
    """One row of sums for each image, gathered in order: equal on any number of ranks.

    Args:
        num_sums: S.
        sums: of prediction and truth, float64 (S,).
        scores: metrics by name, of rows (N, S).
        num_images: of all ranks.
        device: of the rows.
    """

    def __init__(
        self,
        num_sums: int,
        sums: Callable[[Tensor, Tensor], Tensor],
        scores: Callable[[Tensor], dict[str, float]],
        num_images: int,
        device: torch.device,
    ) -> None:
        self._sums, self._scores, self._num_images = sums, scores, num_images
        self._rows = [torch.zeros(0, num_sums, dtype=torch.float64, device=device)]

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """See `Counter`."""
        self._rows.append(self._sums(predicted, truth)[None])

    def metrics(self) -> dict[str, float]:
        """See `Counter`."""
        return self._scores(gather_shares(torch.cat(self._rows), self._num_images).cpu())
