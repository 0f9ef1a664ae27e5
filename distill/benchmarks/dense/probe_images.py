"""How the images of a data set reach a frozen encoder, and predictions the pixels of the truth."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from distill.benchmarks.dense.dense_map import dense_map
from distill.benchmarks.dense.pixel_samples import LabelledPixels, nearest
from distill.benchmarks.dense.pixel_task import TaskGroup
from teachers.teacher import Teacher


class PixelReader(Protocol):
    """The part of a dense probe that its images need."""

    config: Any

    def read(self, sample: Any) -> LabelledPixels:
        """See `DenseProbe.read`."""


class ProbeImages(ABC):
    """The training views and test images of a probe, for one encoder.

    Args:
        encoder: frozen, on this process's device.
        tasks: of the probe.
        probe: reads the images; its config has `dataset`, `labels` and the input.

    Attributes:
        dims: channels of each map that `encode` returns.
        size: (height, width) in pixels of the truth of every training view.
        protocol: the entries of `Measurement.protocol` that are decided here.
        size_keys: the recipe's keys that bring training images to one size.
    """

    size: tuple[int, int]
    protocol: dict[str, Any]
    size_keys: ClassVar[str]

    def __init__(self, encoder: Teacher, tasks: TaskGroup, probe: PixelReader) -> None:
        self.encoder, self.tasks, self.probe = encoder, tasks, probe
        self.config, self.dims = probe.config, [encoder.spec.spatial_dim]
        self.samples = probe.config.dataset.samples("train")

    def __len__(self) -> int:
        """The number of training views."""
        return self.num_views(len(self.samples))

    def num_views(self, num_samples: int) -> int:
        """The number of training views of the first samples, which come first among all."""
        return num_samples

    @abstractmethod
    def view(self, number: int, generator: torch.Generator | None) -> LabelledPixels:
        """A training view, the image at the size that is encoded.

        Args:
            number: of the view.
            generator: of the augmentation; None for a view that is cached.
        """

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) in [0, 1] to the maps that a head takes."""
        return (dense_map(self.encoder, images).features,)

    @abstractmethod
    def on_pixels(self, predicted: Tensor, stride: int) -> Tensor:
        """Predictions (B, K, h, w) for training views, at every n-th pixel of their truth."""

    @abstractmethod
    def predict(
        self, heads: Sequence[nn.Module], image: Tensor, size: tuple[int, int]
    ) -> list[Tensor]:
        """Decoded predictions (C, *size) of each head for a stored test image (3, H, W)."""

    def check(self, sample: Any) -> None:
        """Checks that the encoder takes training views and a test image.

        Raises:
            TeacherError: it does not; the message has the cure.
        """
        return

    def counted(self, truth: Tensor, key: str) -> Tensor:
        """The truth of a test image, unknown where it does not count."""
        return truth

    def test(self, sample: Any) -> LabelledPixels:
        """A test image as it is stored, and its truth on the grid that is counted."""
        image, truth = self.probe.read(sample)
        truth, labels = self.counted(truth, self.key(sample)), self.config.labels
        return LabelledPixels(image, truth if labels is None else nearest(truth, labels))

    def key(self, sample: Any) -> str:
        """The name of a sample, for messages."""
        return sample if isinstance(sample, str) else sample.key
