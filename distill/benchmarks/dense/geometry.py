"""Probes of depth and of normals: their input, and the mean map that they are compared with."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from data.errors import DataError
from data.labelled.depth import AnyDepth, DepthSample, DepthView
from data.labelled.depth_files import Window
from data.labelled.survey import Finding, Size, one_size
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.dense.dense_map import covered, dense_layers, padded_size, to_pixels
from distill.benchmarks.dense.dense_probe import Candidate, DenseProbe
from distill.benchmarks.dense.dpt import NUM_LAYERS
from distill.benchmarks.dense.heads import DPTHeadConfig, HeadConfig
from distill.benchmarks.dense.pixel_samples import LabelledPixels, image_tensor, nearest
from distill.benchmarks.dense.pixel_task import TaskGroup
from distill.benchmarks.dense.probe_images import ProbeImages
from distill.benchmarks.dense.probe_training import ProbeConfig
from distill.benchmarks.dense.unaugmented import without_augmentation
from distill.benchmarks.sharing import own_share
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.config import StrictConfig
from teachers.features import Frame
from teachers.teacher import Teacher, even_layers
from teachers.upsamplers.resize import Size2d, resize


class GeometryInput(StrictConfig):
    """The input of an encoder.

    Attributes:
        size: (height, width) in pixels that images, of training and of test, are resized to;
            `native` for the encoder's own resolution; None for images as they are.
        window: the part of training images that is trained on; None for all of them.
        crop: (height, width) in pixels of the random crops of that part, on-line; None for none.
        flip: whether half of the training images are mirrored, on-line.
    """

    size: Size2d | Literal["native"] | None = None
    window: Window | None = None
    crop: Size2d | None = None
    flip: bool = True


class GeometryConfig(BenchmarkConfig):
    """A probe of depth or of normals.

    Attributes:
        dataset: the data set and its layout.
        input: of the encoder.
        probe: how the head is trained.
        head: `linear` on the last map or `dpt` on four layers.
        loss_stride: the loss is taken at every n-th pixel along both axes.
        counted: the part of test images that counts, such as Eigen's crop; None for all of them.
        labels: (height, width) that the truth of test images is resized to before it is counted;
            None for its own size.
        flip_average: whether predictions are averaged over an image and its mirror image.
    """

    dataset: AnyDepth
    input: GeometryInput = GeometryInput()
    probe: ProbeConfig
    head: HeadConfig
    loss_stride: PositiveInt = 1
    counted: Window | None = None
    labels: Size2d | None = None
    flip_average: bool = False

    @model_validator(mode="after")
    def _states_its_augmentation(self) -> Self:
        without_augmentation(self, off={"crop": None})
        return self


class GeometryImages(ProbeImages):
    """Truth stays as it is stored; only the images are resized for the encoder."""

    size_keys = "input.window or input.crop"

    def __init__(self, encoder: Teacher, tasks: TaskGroup, probe: DenseProbe) -> None:
        super().__init__(encoder, tasks, probe)
        chosen, head, labels = self.config.input, self.config.head, self.config.labels
        self.layers: tuple[int, ...] | None = None
        if isinstance(head, DPTHeadConfig):
            self.layers = head.layers or even_layers(encoder.num_layers, NUM_LAYERS)
        self.input_size = encoder.spec.resolution if chosen.size == "native" else chosen.size
        online = self.config.probe.mode == "online"
        self.size = (online and chosen.crop) or _size(self.view(0, None).labels)
        self._encoded = self.input_size or self.size
        blank = torch.zeros(1, 3, *self._encoded, device=encoder.mean.device)
        self.dims = [maps.shape[1] for maps in self.encode(blank)]
        self.protocol = {
            "input_size": "as stored" if self.input_size is None else list(self.input_size),
            "metric_grid": "as stored" if labels is None else list(labels),
        }

    def view(self, number: int, generator: torch.Generator | None) -> LabelledPixels:
        """See `ProbeImages`."""
        chosen, sample = self.config.input, self.samples[number]
        image, truth = self.probe.read(sample)
        if chosen.window is not None:
            part = (..., *chosen.window.slices(*_size(truth), sample.key))
            image, truth = image[part], truth[part]
        if generator is not None and chosen.crop is not None:
            part = (..., *_random_window(truth, chosen.crop, sample.key, generator))
            image, truth = image[part], truth[part]
        if generator is not None and chosen.flip and torch.rand((), generator=generator) < 0.5:
            image, truth = image.flip(-1), self._mirror(truth)
        return LabelledPixels(self._resized(image), truth)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `ProbeImages`."""
        if self.layers is None:
            return super().encode(images)
        return tuple(dense_layers(self.encoder, images, self.layers))

    def check(self, sample: DepthSample) -> None:
        """See `ProbeImages`; the constructor encodes a blank view, which checks the rest."""
        padded_size(self.encoder.spec, *_size(self._resized(self.probe.read(sample).image)))

    def on_pixels(self, predicted: Tensor, stride: int) -> Tensor:
        """See `ProbeImages`."""
        covers = self._covered(self._encoded)
        return to_pixels(predicted, covers, self._encoded, stride, self.size)

    def _covered(self, size: tuple[int, int]) -> Frame:
        """What maps of images of a size cover; a head takes several layers as if they tiled it."""
        if self.layers is not None:
            return Frame(*padded_size(self.encoder.spec, *size))
        return covered(self.encoder.spec, *size)

    def counted(self, truth: Tensor, key: str) -> Tensor:
        """See `ProbeImages`."""
        if self.config.counted is None:
            return truth
        part = (..., *self.config.counted.slices(*_size(truth), key))
        kept = torch.zeros_like(truth)
        kept[part] = truth[part]
        return kept

    @torch.no_grad()
    def predict(
        self, heads: Sequence[nn.Module], image: Tensor, size: tuple[int, int]
    ) -> list[Tensor]:
        """See `ProbeImages`."""
        pixels = self._resized(image).to(self.encoder.mean.device)
        flip, seen = self.config.flip_average, _size(pixels)
        maps = self.encode(torch.stack([pixels, pixels.flip(-1)] if flip else [pixels]))
        covers = self._covered(seen)
        predicted = []
        for head in heads:
            decoded = self.tasks.decode(to_pixels(head(*maps), covers, seen, resized=size))
            if flip:
                decoded = self.tasks.decode_means((decoded[:1] + self._mirror(decoded[1:])) / 2)
            predicted.append(decoded[0])
        return predicted

    def _resized(self, image: Tensor) -> Tensor:
        size = self.input_size
        return image if size is None else resize(image[None], size)[0]

    def _mirror(self, maps: Tensor) -> Tensor:
        return self.tasks.adapt(maps.flip(-1), 1.0, True)


class GeometryProbe(DenseProbe):
    """A dense probe on a depth set, compared with the mean map; truth is 0 where unknown."""

    config: GeometryConfig

    @abstractmethod
    def truth(self, view: DepthView, sample: DepthSample) -> Tensor:
        """The truth of an image, (C, H, W)."""

    def read(self, sample: DepthSample) -> LabelledPixels:
        """See `DenseProbe`."""
        view = self.config.dataset.read(sample)
        return LabelledPixels(image_tensor(view.image), self.truth(view, sample))

    def judge_sizes(self, sizes: Mapping[str, Sequence[Size]]) -> list[Finding]:
        """Errors where a window or a crop exceeds an image, or a batch would have several sizes."""
        window, counted, crop = (
            self.config.input.window,
            self.config.counted,
            self.config.input.crop,
        )
        try:
            if window is not None:
                for size in sizes["train"]:
                    window.slices(*size, "input.window: a training image")
            if counted is not None:
                for size in sizes["test"]:
                    counted.slices(*size, "counted: a test image")
        except DataError as error:
            return [Finding(str(error), fatal=True, final=True)]
        seen = list(sizes["train"])
        if window is not None:
            (top, bottom), (left, right) = window.rows, window.columns
            seen = [(bottom - top, right - left)]
        if crop is None:
            return one_size(seen, "input.window or input.crop")
        small = [size for size in seen if size[0] < crop[0] or size[1] < crop[1]]
        if not small:
            return []
        text = f"input.crop: {list(crop)} px, but a training image has {small[0]} px"
        return [Finding(text, fatal=True, final=True)]

    def images(self, encoder: Teacher, tasks: TaskGroup) -> GeometryImages:
        """See `DenseProbe`."""
        return GeometryImages(encoder, tasks, self)

    def constants(self) -> dict[str, Tensor]:
        """The mean training truth at each place, of all places where none is known there."""
        samples = self.config.dataset.samples("train")
        first = self.read(samples[0]).labels
        total = torch.zeros(len(first) + 1, *_size(first), dtype=torch.float64)
        for number in tracked(own_share(len(samples)), "mean map"):
            truth = nearest(self.read(samples[number]).labels, _size(first)).double()
            total += torch.cat([truth, (truth != 0).any(0, keepdim=True).double()])
        total = distributed.all_reduce(total.to(distributed.device())).cpu()
        sums, counts = total[:-1], total[-1:]
        everywhere = sums.sum((1, 2), keepdim=True) / counts.sum().clamp(min=1)
        mean = torch.where(counts > 0, sums / counts.clamp(min=1), everywhere)
        return {"mean map": mean.float()}

    def facts(self, known: Tensor) -> dict[str, Any]:
        """See `DenseProbe`."""
        return {"test_images_without_truth": int((known == 0).sum())}

    def tables(self, candidates: Sequence[Candidate], best: Sequence[Candidate]) -> dict[str, Any]:
        """The metrics of all learning rates and of the mean map."""
        metrics = {each.name: next(iter(each.metrics.values())) for each in candidates}
        table = {"mean map": metrics.pop("mean map")}
        return {"figures.json": table | {f"lr {rate}": each for rate, each in metrics.items()}}


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _random_window(
    truth: Tensor, crop: tuple[int, int], name: str, generator: torch.Generator
) -> tuple[slice, slice]:
    parts = []
    for length, wanted in zip(_size(truth), crop, strict=True):
        if wanted > length:
            raise DataError(f"input.crop: {list(crop)} of '{name}', {_size(truth)} px")
        first = int(torch.randint(length - wanted + 1, (), generator=generator))
        parts.append(slice(first, first + wanted))
    return parts[0], parts[1]
