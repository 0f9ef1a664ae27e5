"""Adds up what figures of several tasks are made of, over the images of all ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.classification import BinaryPrecisionRecallCurve

from data.labelled.files import IGNORED
from distill.benchmarks.dense.confusion import (
    confusion_matrix,
    miou_absent_as_0,
    segmentation_scores,
)
from distill.benchmarks.sharing import gather_shares
from distill.runtime import distributed

THRESHOLDS = 255


class MaxF:
    """The largest F1 over 255 thresholds between 0 and 1, pooled over pixels, not over images.

    torchmetrics counts, and adds up over ranks when `compute` is called, which all ranks have to
    do. It takes values outside [0, 1] for logits by itself; here they are refused, because a batch
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
                f"saliency from {float(low):g} to {float(high):g}: probabilities in [0, 1] are due"
            )
        self._curve.update(probabilities, labels.long())

    def compute(self) -> float:
        """The largest F1 in per cent; 0 where no pixel is salient."""
        # torchmetrics has NaN for the precision where nothing is predicted: no hit, F is 0.
        precision, recall = (c.double().nan_to_num(0) for c in self._curve.compute()[:2])
        scores = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return 100 * float(scores.max())


class Counter(ABC):
    """Adds up the test images of this rank."""

    @abstractmethod
    def add(self, decided: Tensor, truth: Tensor) -> None:
        """One image's prediction and truth, (C, H, W) both, on the counter's device."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """The figures of all ranks' images; every rank calls this."""


class ClassCounter(Counter):
    """mIoU of one confusion matrix, by our convention and by the published one."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, decided: Tensor, truth: Tensor) -> None:
        """See `Counter`."""
        self._matrix += confusion_matrix(decided[0].long(), truth[0], len(self._matrix))

    def figures(self) -> dict[str, float]:
        """See `Counter`."""
        matrix = distributed.all_reduce(self._matrix.clone()).cpu()
        figure = segmentation_scores(matrix)["miou"]
        return {"miou": figure, "miou_absent_as_0": miou_absent_as_0(matrix)}


class SaliencyCounter(Counter):
    """The largest F measure."""

    def __init__(self, device: torch.device) -> None:
        self._curve = MaxF(device)

    def add(self, decided: Tensor, truth: Tensor) -> None:
        """See `Counter`."""
        self._curve.update(decided, truth)

    def figures(self) -> dict[str, float]:
        """See `Counter`."""
        return {"max_f": self._curve.compute()}


class SumsCounter(Counter):
    """A row an image: gathered in their order they add up alike on any number of ranks.

    Args:
        num_sums: S.
        sums: of prediction and truth, float64 (S,).
        scores: figures by name, of rows (N, S).
        headline: the one that is wanted.
        num_images: of all ranks.
        device: of the rows.
    """

    def __init__(
        self,
        num_sums: int,
        sums: Callable[[Tensor, Tensor], Tensor],
        scores: Callable[[Tensor], dict[str, float]],
        headline: str,
        num_images: int,
        device: torch.device,
    ) -> None:
        self._none = torch.zeros(0, num_sums, dtype=torch.float64, device=device)
        self._sums, self._scores, self._headline = sums, scores, headline
        self._num_images, self._rows = num_images, [self._none]

    def add(self, decided: Tensor, truth: Tensor) -> None:
        """See `Counter`."""
        self._rows.append(self._sums(decided, truth)[None])

    def figures(self) -> dict[str, float]:
        """See `Counter`."""
        rows = gather_shares(torch.cat(self._rows), self._num_images).cpu()
        return {self._headline: self._scores(rows)[self._headline]}
