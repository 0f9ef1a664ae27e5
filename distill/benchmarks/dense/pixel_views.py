"""Images with label maps for a dense probe: augmented or in windows; tested whole or sliding."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.benchmarks.dense.dense_map import dense_map, padded_size, to_pixels
from distill.benchmarks.dense.pixel_inference import predict
from distill.benchmarks.dense.pixel_samples import (
    LabelledPixels,
    ResolvedInput,
    augmented,
    cut,
    input_size,
    padded,
    resized,
    windows,
)
from distill.benchmarks.dense.pixel_task import TaskGroup
from distill.benchmarks.dense.probe_images import ProbeImages
from teachers.teacher import Teacher


class PixelViews(ProbeImages):
    """Truth has the size of the encoded image; where features are cached, crops are windows.

    Args:
        encoder: frozen.
        tasks: of the probe.
        read: an image and its truth, of a sample.
        samples: to train on.
        keys: of these samples, for messages.
        seen: the input, resolved for the encoder.
        cached: whether the features of training images are cached.
        batch_size: windows of a test image that are encoded at once.
        labels: (height, width) that test labels are resized to; None for their own size.
        averaged: see `predict`.
    """

    size_keys = "input.size or input.crop"

    def __init__(
        self,
        encoder: Teacher,
        tasks: TaskGroup,
        read: Callable[[Any], LabelledPixels],
        samples: Sequence[Any],
        keys: Sequence[str],
        *,
        seen: ResolvedInput,
        cached: bool,
        batch_size: int,
        labels: tuple[int, int] | None = None,
        averaged: Callable[[Tensor], Tensor],
    ) -> None:
        self.encoder, self.dims = encoder, (encoder.spec.spatial_dim,)
        self._tasks, self._read, self._samples, self._keys = tasks, read, samples, keys
        self._seen, self._batch_size = seen, batch_size
        self._labels, self._averaged = labels, averaged
        self._views: list[tuple[int, tuple[int, int] | None]]
        self._views = [(number, None) for number in range(len(samples))]
        if cached and seen.crop is not None:
            self._views = list(self._windows(seen.crop))
        self.size = seen.crop or self._image(0).size
        self.protocol = {
            "input": seen.model_dump(mode="json"),
            "inference": "whole" if seen.stride is None else "slide",
            "metric_grid": "as labelled" if labels is None else list(labels),
        }

    def _windows(self, crop: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
        for number in range(len(self._samples)):
            size = padded(self._image(number), crop).size
            for corner in windows(size, crop, self._seen.stride or crop):
                yield number, corner

    def __len__(self) -> int:
        """See `ProbeImages`."""
        return len(self._views)

    def key(self, number: int) -> str:
        """See `ProbeImages`."""
        return self._keys[self._views[number][0]]

    def view(self, number: int, generator: torch.Generator | None) -> LabelledPixels:
        """See `ProbeImages`."""
        image, corner = self._views[number]
        pixels, crop, tasks = self._image(image), self._seen.crop, self._tasks
        if generator is not None:
            return augmented(pixels, self._seen, generator, tasks.adapt, tasks.unknown)
        if corner is None or crop is None:
            return pixels
        window = padded(pixels, crop, tasks.unknown)
        return LabelledPixels(*(cut(each, corner, crop) for each in window))

    def _image(self, number: int) -> LabelledPixels:
        """A training image at its input size."""
        pixels = self._read(self._samples[number])
        return resized(pixels, input_size(self._seen, *pixels.size))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `ProbeImages`."""
        return (dense_map(self.encoder, images).features,)

    def on_pixels(self, predicted: Tensor, stride: int) -> Tensor:
        """See `ProbeImages`."""
        covers = padded_size(self.encoder.spec, *self.size)
        return to_pixels(predicted, covers, self.size, stride)

    def test(self, sample: Any) -> LabelledPixels:
        """See `ProbeImages`."""
        pixels = self._read(sample)
        if self._labels is None:
            return pixels
        return pixels._replace(labels=resized(pixels, self._labels).labels)

    def predict(
        self, heads: Sequence[nn.Module], image: Tensor, size: tuple[int, int]
    ) -> list[Tensor]:
        """See `ProbeImages`."""
        predicted = predict(
            self.encoder, heads, image, self._seen, size, self._batch_size, self._averaged
        )
        return [self._tasks.decode(each) for each in predicted]
