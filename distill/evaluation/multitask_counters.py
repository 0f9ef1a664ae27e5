"""Adds up what figures of several tasks are made of, over the images of all ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from distill.benchmarks.sharing import gather_shares
from distill.evaluation.confusion import confusion_matrix, miou_absent_as_0, segmentation_scores
from distill.evaluation.saliency import MaxF
from distill.runtime import distributed


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
