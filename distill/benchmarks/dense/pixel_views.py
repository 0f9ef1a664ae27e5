"""Images with label maps for a dense probe: augmented or in windows; tested whole or sliding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.benchmarks.dense.dense_map import covered, padded_size, to_pixels
from distill.benchmarks.dense.pixel_inference import predict
from distill.benchmarks.dense.pixel_samples import (
    LabelledPixels,
    augmented,
    cut,
    input_size,
    padded,
    resized,
    windows,
)
from distill.benchmarks.dense.pixel_task import TaskGroup
from distill.benchmarks.dense.probe_images import PixelReader, ProbeImages
from teachers.teacher import Teacher


class PixelViews(ProbeImages):
    """Truth has the size of the encoded image; where features are cached, crops are windows.

    Args:
        encoder: frozen.
        tasks: of the probe.
        probe: its config has `input`, an `InputConfig`, and `batch_size`.
        averaged: of sliding windows, see `predict`.
    """

    size_keys = "input.size or input.crop"

    def __init__(
        self,
        encoder: Teacher,
        tasks: TaskGroup,
        probe: PixelReader,
        averaged: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(encoder, tasks, probe)
        self._seen = seen = self.config.input.resolved(encoder.spec)
        self._averaged = averaged
        self._views: list[tuple[Any, tuple[int, int] | None]] = [(s, None) for s in self.samples]
        self._num_windows: list[int] | None = None  # of each sample
        if self.config.probe.mode == "cached" and seen.crop is not None:
            found = [self._windows(sample, seen.crop) for sample in self.samples]
            self._views = [view for views in found for view in views]
            self._num_windows = [len(views) for views in found]
        self.size = seen.crop or self._image(self.samples[0]).size
        labels = self.config.labels
        self.protocol = {
            "input": seen.model_dump(mode="json"),
            "inference": "whole" if seen.stride is None else "slide",
            "metric_grid": "as labelled" if labels is None else list(labels),
        }

    def _windows(self, sample: Any, crop: tuple[int, int]) -> list[tuple[Any, tuple[int, int]]]:
        """The views of a sample."""
        size = padded(self._image(sample), crop).size
        return [(sample, corner) for corner in windows(size, crop, self._seen.stride or crop)]

    def num_views(self, num_samples: int) -> int:
        """See `ProbeImages`."""
        if self._num_windows is None:
            return num_samples
        return sum(self._num_windows[:num_samples])

    def view(self, number: int, generator: torch.Generator | None) -> LabelledPixels:
        """See `ProbeImages`."""
        sample, corner = self._views[number]
        pixels, crop, tasks = self._image(sample), self._seen.crop, self.tasks
        if generator is not None:
            return augmented(pixels, self._seen, generator, tasks.adapt, tasks.unknown)
        if corner is None:
            return pixels
        whole = padded(pixels, crop, tasks.unknown)
        return LabelledPixels(*(cut(each, corner, crop) for each in whole))

    def _image(self, sample: Any) -> LabelledPixels:
        """A training image at its input size."""
        pixels = self.probe.read(sample)
        return resized(pixels, input_size(self._seen, *pixels.size))

    def check(self, sample: Any) -> None:
        """See `ProbeImages`."""
        padded_size(self.encoder.spec, *self.size)
        if self._seen.stride is None:
            padded_size(self.encoder.spec, *input_size(self._seen, *self.probe.read(sample).size))

    def on_pixels(self, predicted: Tensor, stride: int) -> Tensor:
        """See `ProbeImages`."""
        covers = covered(self.encoder.spec, *self.size)
        return to_pixels(predicted, covers, self.size, stride)

    def predict(
        self, heads: Sequence[nn.Module], image: Tensor, size: tuple[int, int]
    ) -> list[Tensor]:
        """See `ProbeImages`."""
        batch_size, averaged = self.config.batch_size, self._averaged
        predicted = predict(self.encoder, heads, image, self._seen, size, batch_size, averaged)
        return [self.tasks.decode(each) for each in predicted]
