"""Trains probes that predict every pixel: images in, augmented or in windows, heads out."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import DataError
from data.labelled.files import IGNORED
from distill.benchmarks.dense.dense_map import dense_map, padded_size, to_pixels
from distill.benchmarks.dense.pixel_samples import (
    Adapt,
    LabelledPixels,
    ResolvedInput,
    augmented,
    cut,
    input_size,
    padded,
    resized,
    unchanged,
    windows,
)
from distill.benchmarks.dense.probe_training import ProbeConfig, probe_features, train_heads
from teachers.teacher import Teacher


class PixelViews:
    """What a probe trains on: images, or, where features are cached, all windows of them.

    Args:
        read: an image by its number, as it is stored.
        keys: of the images, for messages.
        seen: what the encoder sees of them.
        probe: how heads are trained.
        adapt: of augmented labels, see `augmented`.
    """

    def __init__(
        self,
        read: Callable[[int], LabelledPixels],
        keys: Sequence[str],
        seen: ResolvedInput,
        probe: ProbeConfig,
        adapt: Adapt = unchanged,
    ) -> None:
        self._read, self._keys, self._seen = read, keys, seen
        self._probe, self._adapt = probe, adapt
        self._views: list[tuple[int, tuple[int, int] | None]] = [
            (number, None) for number in range(len(keys))
        ]
        if probe.mode == "cached" and seen.crop is not None:
            self._views = list(self._windows(seen.crop))

    def _windows(self, crop: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
        for number in range(len(self._keys)):
            size = padded(self._image(number), crop).size
            for corner in windows(size, crop, self._seen.stride or crop):
                yield number, corner

    def train(
        self,
        encoder: Teacher,
        build_head: Callable[[int], nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        stride: int,
        seed: int,
        folder: Path,
    ) -> list[nn.Module]:
        """A head for each learning rate.

        Args:
            encoder: frozen.
            build_head: makes one for maps of D channels; it gives (B, K, h, w).
            loss: of pixels, (B, K, H', W') and their labels (B, ..., H', W').
            stride: the loss is taken at every n-th pixel along both axes.
            seed: of everything random.
            folder: for cached features.

        Raises:
            DataError: images differ in size.
        """
        size = self._seen.crop or self._image(0).size
        covers = padded_size(encoder.spec, *size)
        places = (..., slice(stride // 2, None, stride), slice(stride // 2, None, stride))

        def sample(number: int, generator: torch.Generator | None) -> LabelledPixels:
            pixels = self._view(number, generator)
            if pixels.size != size:
                raise DataError(
                    f"input: '{self._keys[number]}' is {pixels.size} px, the first image {size}; "
                    "set input.size or input.crop to bring all to one size"
                )
            return pixels._replace(labels=pixels.labels[places])

        def encode(images: Tensor) -> tuple[Tensor]:
            return (dense_map(encoder, images).features,)

        def dense_loss(predicted: Tensor, labels: Tensor, _: int) -> Tensor:
            return loss(to_pixels(predicted, covers, size, stride), labels)

        def build() -> nn.Module:
            return build_head(encoder.spec.spatial_dim)

        probe, count = self._probe, len(self._views)
        features = probe_features(probe, sample, encode, count, seed, folder)
        return train_heads(build, probe, features, dense_loss, count, seed)

    def _view(self, number: int, generator: torch.Generator | None) -> LabelledPixels:
        image, corner = self._views[number]
        pixels = self._image(image)
        if generator is not None:
            return augmented(pixels, self._seen, generator, self._adapt)
        crop = self._seen.crop
        if corner is None or crop is None:
            return pixels
        return LabelledPixels(*(cut(each, corner, crop) for each in padded(pixels, crop)))

    def _image(self, number: int) -> LabelledPixels:
        """An image at its input size."""
        pixels = self._read(number)
        return resized(pixels, input_size(self._seen, *pixels.size))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labelled pixels, 0 where there is none.

    Args:
        logits: (B, K, H, W).
        labels: classes (B, H, W), 255 where ignored.
    """
    wanted = labels.long()
    total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp(min=1)
