"""The tasks of dense probes: truth, head, loss and metrics of what is predicted for each pixel.

Truth and decoded predictions are (C, H, W). Where the truth is unknown, all its channels hold the
task's `unknown` value: 255 for classes and saliency, 0 for depth and normals.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.labelled.files import IGNORED
from distill.benchmarks.dense.counters import Counter, SumsCounter
from distill.benchmarks.dense.heads import LinearHead, TaskHeads


class PixelTask(ABC):
    """One kind of label.

    Args:
        name: for messages; where a probe has several tasks also in the names of metrics.
        outputs: channels that a head predicts.
        weight: of the loss beside those of other tasks.
        reported: names of the metrics that count; None for all.
        dropout: of the linear head's channels.

    Attributes:
        headline: the metric that chooses among learning rates.
        lower_is_better: whether that is an error.
        channels: C, of the truth.
        unknown: the truth of pixels that neither train nor count.
    """

    headline: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    channels: ClassVar[int] = 1
    unknown: ClassVar[int] = IGNORED

    def __init__(
        self,
        name: str,
        outputs: int = 1,
        weight: float = 1.0,
        reported: Sequence[str] | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.name, self.outputs, self.weight = name, outputs, weight
        self.reported, self._dropout = reported, dropout

    def build(self, dims: Sequence[int]) -> nn.Module:
        """A new head for maps of `dims` channels; predicts (B, outputs, h, w)."""
        return LinearHead(dims[0], self.outputs, self._dropout)

    @abstractmethod
    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """The mean over known pixels, 0 without any.

        Args:
            predicted: (B, outputs, H, W), not decoded.
            truth: (B, C, H, W).
            step: the 0-based step of the training.
        """

    @abstractmethod
    def decode(self, predicted: Tensor) -> Tensor:
        """Predictions (..., outputs, H, W) in the form of the truth, (..., C, H, W)."""

    @abstractmethod
    def counter(self, num_images: int, device: torch.device) -> Counter:
        """A counter of the test images of all ranks."""

    @abstractmethod
    def colours(self, maps: Tensor, truth: Tensor) -> Tensor:
        """Truth or a decoded prediction as a picture (3, H, W), in the range of the truth."""

    def known(self, truth: Tensor) -> Tensor:
        """Where the truth (..., C, H, W) is known, bool (..., H, W)."""
        return (truth != self.unknown).any(-3)

    def adapt(self, maps: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """Changes the values that depend on how an image was moved, such as directions in a mirror.

        Args:
            maps: truth or decoded predictions (..., C, H, W), already moved.
            ratio: by which they were enlarged.
            mirrored: whether left and right changed places.
        """
        return maps

    def metrics(self, counter: Counter) -> dict[str, float]:
        """The reported metrics of a counter; every rank calls this."""
        values = counter.metrics()
        return values if self.reported is None else {name: values[name] for name in self.reported}

    def best(self, candidates: Sequence[dict[str, float]]) -> int:
        """The number of the best candidate by the headline; of equals the first."""
        sign = 1 if self.lower_is_better else -1
        return min(range(len(candidates)), key=lambda i: sign * candidates[i][self.headline])


class RegressionTask(PixelTask):
    """A task of continuous values: L1, and metrics from a row of sums for each image.

    Attributes:
        num_sums: S.
    """

    lower_is_better = True
    unknown = 0
    num_sums: ClassVar[int]

    @abstractmethod
    def sums(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The sums of one image that its metrics are computed from, float64 (S,)."""

    @abstractmethod
    def scores(self, sums: Tensor) -> dict[str, float]:
        """The metrics of a test set, from (N, S)."""

    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """The mean absolute difference; see `PixelTask.loss`."""
        known = self.known(truth)[:, None].expand_as(truth)
        if not known.any():
            return predicted.sum() * 0
        return (predicted[known] - truth[known]).abs().mean()

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """See `PixelTask.counter`."""
        return SumsCounter(self.num_sums, self.sums, self.scores, num_images, device)


class TaskGroup:
    """The tasks of one probe, whose truth and predictions follow each other in the channels.

    Args:
        tasks: one or several.
    """

    def __init__(self, tasks: Iterable[PixelTask]) -> None:
        self.tasks = tuple(tasks)
        fills = [torch.full((task.channels, 1, 1), task.unknown) for task in self.tasks]
        self.unknown = torch.cat(fills)  # (C, 1, 1)

    def prefix(self, task: PixelTask, form: str) -> str:
        """`form` with the name of a task; empty if the group has only one task."""
        return form.format(task.name) if len(self.tasks) > 1 else ""

    def parts(self, *maps: Tensor) -> Iterable[Any]:
        """Each task with its channels of truths or decoded predictions (..., C, H, W)."""
        channels = [task.channels for task in self.tasks]
        return zip(self.tasks, *(each.split(channels, dim=-3) for each in maps), strict=True)

    def build(self, dims: Sequence[int]) -> TaskHeads:
        """New heads for maps of `dims` channels."""
        return TaskHeads(task.build(dims) for task in self.tasks)

    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """The weighted sum of the tasks' losses; see `PixelTask.loss`."""
        parts = zip(self.parts(truth), self._outputs(predicted), strict=True)
        return torch.stack([t.weight * t.loss(own, true, step) for (t, true), own in parts]).sum()

    def decode(self, predicted: Tensor) -> Tensor:
        """See `PixelTask.decode`."""
        parts = zip(self.tasks, self._outputs(predicted), strict=True)
        return torch.cat([task.decode(part) for task, part in parts], dim=-3)

    def decode_means(self, maps: Tensor) -> Tensor:
        """Means of decoded predictions, (..., C, H, W), in the form of the truth again."""
        return torch.cat([task.decode(part) for task, part in self.parts(maps)], dim=-3)

    def adapt(self, maps: Tensor, ratio: float, mirrored: bool) -> Tensor:
        """See `PixelTask.adapt`."""
        parts = self.parts(maps)
        return torch.cat([task.adapt(part, ratio, mirrored) for task, part in parts], dim=-3)

    def _outputs(self, predicted: Tensor) -> Sequence[Tensor]:
        return predicted.split([task.outputs for task in self.tasks], dim=-3)
