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
    segmentation_scores,
)
from distill.benchmarks.sharing import gather_shares
from distill.runtime import distributed

THRESHOLDS = 255


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
        """See `segmentation_scores`."""
        return segmentation_scores(self._everywhere())

    def ious(self) -> list[float | None]:
        """The IoU in per cent of each class, None without a union; every rank calls this."""
        return class_ious(self._everywhere())

    def _everywhere(self) -> Tensor:
        return distributed.all_reduce(self._matrix.clone()).cpu()


class SaliencyCounter(Counter):
    """The largest F1 over 255 thresholds between 0 and 1, pooled over pixels, not over images.

    Args:
        device: of the counts.
    """

    def __init__(self, device: torch.device) -> None:
        curve = BinaryPrecisionRecallCurve(thresholds=THRESHOLDS, ignore_index=IGNORED)
        self._curve = curve.to(device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Adds pixels.

        Args:
            predicted: probabilities of any shape. Outside [0, 1], torchmetrics sees logits.
            truth: of the same shape: 1 salient, 0 not, 255 ignored.

        Raises:
            ValueError: a value is no probability.
        """
        low, high = predicted.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"saliency: expected probabilities in [0, 1], got {float(low):g} to {float(high):g}"
            )
        self._curve.update(predicted, truth.long())

    def metrics(self) -> dict[str, float]:
        """`max_f` in per cent; 0 where no pixel is salient."""
        # torchmetrics has NaN for the precision where nothing is predicted: no hit, F is 0.
        precision, recall = (c.double().nan_to_num(0) for c in self._curve.compute()[:2])
        scores = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {"max_f": 100 * float(scores.max())}


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
