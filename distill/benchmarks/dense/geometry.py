"""What the probes of depth and of normals share: images and truth, heads, training, counting."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.batch import scale_pixels
from data.errors import DataError
from data.labelled.depth import DepthSample, DepthView
from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.benchmarks.dense.geometry_heads import GeometryConfig, Reader
from distill.benchmarks.dense.probe_training import probe_features, train_heads
from distill.benchmarks.sharing import gather_shares, own_share
from distill.display.pictures import draw_columns
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize

SHOWN = 4  # test images of a picture


class Geometry(Benchmark):
    """Trains a probe that predicts each pixel, then counts the pixels of the test images.

    Truth is (C, H, W), and 0 where it is unknown.
    """

    headline: ClassVar[str]
    num_sums: ClassVar[int]  # S
    config: GeometryConfig

    @abstractmethod
    def truth(self, view: DepthView, sample: DepthSample) -> Tensor:
        """The truth of an image, (C, H, W)."""

    @abstractmethod
    def build(self, dims: Sequence[int]) -> nn.Module:
        """A head for maps of `dims` channels; predicts (B, C', h, w)."""

    @abstractmethod
    def loss(self, prediction: Tensor, truth: Tensor, step: int) -> Tensor:
        """Of pixels: (B, C', ...) and (B, C, ...) of a 0-based step."""

    @abstractmethod
    def finish(self, prediction: Tensor) -> Tensor:
        """What counts of predictions (B, C', H, W): (B, C, H, W)."""

    @abstractmethod
    def mirror(self, maps: Tensor) -> Tensor:
        """Truth, or what counts of a prediction, (..., C, H, W), of the mirrored image."""

    @abstractmethod
    def sums(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """What the figures of one image are made of, float64 (S,); (C, H, W) both."""

    @abstractmethod
    def scores(self, sums: Tensor) -> dict[str, float]:
        """The figures of a test set, from (N, S)."""

    @abstractmethod
    def colours(self, maps: Tensor, truth: Tensor) -> Tensor:
        """Truth or a prediction (C, H, W) as a picture (3, H, W), in the range of the truth."""

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """The figures of the best learning rate on the test images, and those of the mean map.

        The mean map is the mean of the training images' truth at each place: what is known
        without looking at an image. The folder gets the probe, the figures of every rate and all
        of the mean map, and predictions beside truth.
        """
        reader = Reader(encoder, self.config)
        heads = self._train(reader, seed, folder)
        mean_map = self._mean_map()
        sums = self._count(reader, heads, mean_map)
        scores = [self.scores(rows) for rows in sums.unbind(1)]
        floor = scores.pop()
        headline = self.headline
        sign = 1 if headline in self.lower_is_better else -1
        best = min(range(len(heads)), key=lambda i: sign * scores[i][headline])
        if distributed.rank() == 0:
            rates = (f"lr {lr:g}" for lr in self.config.probe.lr)
            by_name = {"mean map": floor, **dict(zip(rates, scores, strict=True))}
            (folder / "figures.json").write_text(json.dumps(by_name, indent=1))
            self._keep(reader, heads[best], folder)
        labels = self.config.labels
        protocol = {
            "train_images": len(self.config.dataset.samples("train")),
            "test_images": len(sums),
            "test_images_without_truth": int((sums[:, 0, 0] == 0).sum()),
            "input_size": "as stored" if reader.size is None else list(reader.size),
            "metric_grid": "as stored" if labels is None else list(labels),
        }
        return Measurement(scores[best] | {f"mean_map_{headline}": floor[headline]}, protocol)

    def _pixels(self, sample: DepthSample) -> tuple[Tensor, Tensor]:
        """An image (3, H, W) in [0, 1] and its truth."""
        view = self.config.dataset.read(sample)
        image = scale_pixels(torch.tensor(view.image).permute(2, 0, 1))
        return image, self.truth(view, sample)

    def _training_pixels(
        self, sample: DepthSample, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        chosen = self.config.input
        image, truth = self._pixels(sample)
        if chosen.window is not None:
            rows, columns = chosen.window.slices(*_size(truth), sample.key)
            image, truth = image[:, rows, columns], truth[:, rows, columns]
        if generator is not None and chosen.crop is not None:
            rows, columns = _random_window(truth, chosen.crop, sample.key, generator)
            image, truth = image[:, rows, columns], truth[:, rows, columns]
        if generator is not None and chosen.flip and torch.rand((), generator=generator) < 0.5:
            image, truth = image.flip(-1), self.mirror(truth)
        return image, truth

    def _train(self, reader: Reader, seed: int, folder: Path) -> list[nn.Module]:
        config, samples = self.config, self.config.dataset.samples("train")
        image, truth = self._training_pixels(samples[0], None)
        size = _size(truth)
        if config.input.crop is not None and config.probe.mode == "online":
            size = config.input.crop
        seen = reader.size or size
        device = reader.encoder.mean.device
        blank = F.interpolate(image[None], seen).to(device)
        dims = [each.shape[1] for each in reader.encode(blank)]

        def sample(number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
            image, truth = self._training_pixels(samples[number], generator)
            if _size(truth) != size:
                raise DataError(
                    f"input: '{samples[number].key}' is {_size(truth)} px, the first "
                    f"image {size}; set input.window or input.crop to bring all to one size"
                )
            return reader.resized(image), truth[places]

        step = config.loss_stride
        places = (..., slice(step // 2, None, step), slice(step // 2, None, step))

        def loss(maps: Tensor, truth: Tensor, number: int) -> Tensor:
            return self.loss(reader.on_pixels(maps, seen, size, step), truth, number)

        count = len(samples)
        features = probe_features(config.probe, sample, reader.encode, count, seed, folder)
        return train_heads(lambda: self.build(dims), config.probe, features, loss, count, seed)

    def predict(
        self, reader: Reader, head: nn.Module, image: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """What counts of the prediction for an image.

        Args:
            reader: of the encoder's maps.
            head: trained.
            image: (3, H, W) in [0, 1], as it is stored.
            size: (height, width) that is wanted.

        Returns:
            (C, height, width), on the encoder's device.
        """
        device = reader.encoder.mean.device
        pixels = reader.resized(image).to(device)
        views = torch.stack([pixels, pixels.flip(-1)] if self.config.flip_average else [pixels])
        seen = _size(pixels)
        with torch.no_grad():
            maps = head(*reader.encode(views))
        ready = self.finish(reader.on_pixels(maps, seen, size))
        if self.config.flip_average:
            return self.finish((ready[:1] + self.mirror(ready[1:])) / 2)[0]
        return ready[0]

    def _mean_map(self) -> Tensor:
        """(C, H, W): the mean training truth at each place, of all where none is known."""
        samples = self.config.dataset.samples("train")
        first = self._pixels(samples[0])[1]
        grid = _size(first)
        total = torch.zeros(len(first) + 1, *grid, dtype=torch.float64)
        for number in tracked(own_share(len(samples)), "mean map"):
            truth = _nearest(self._pixels(samples[number])[1], grid).double()
            total += torch.cat([truth, (truth != 0).any(0, keepdim=True).double()])
        total = distributed.all_reduce(total.to(distributed.device())).cpu()
        sums, counts = total[:-1], total[-1:]
        everywhere = sums.sum((1, 2), keepdim=True) / counts.sum().clamp(min=1)
        return torch.where(counts > 0, sums / counts.clamp(min=1), everywhere).float()

    def _count(self, reader: Reader, heads: Sequence[nn.Module], mean_map: Tensor) -> Tensor:
        """(N, heads and the mean map, S), over all test images of all ranks."""
        samples, device = self.config.dataset.samples("test"), reader.encoder.mean.device
        own = own_share(len(samples))
        rows = torch.zeros(len(own), len(heads) + 1, self.num_sums, dtype=torch.float64)
        for row, number in zip(rows, tracked(own, "test images"), strict=True):
            image, truth = self._test_pixels(samples[number])
            size, truth = _size(truth), truth.to(device)
            predicted = [self.predict(reader, head, image, size) for head in heads]
            floor = F.interpolate(mean_map[None].to(device), size, mode="bilinear")
            predicted.append(self.finish(floor)[0])
            row.copy_(torch.stack([self.sums(each, truth) for each in predicted]))
        return gather_shares(rows.to(device), len(samples)).cpu()

    def _test_pixels(self, sample: DepthSample) -> tuple[Tensor, Tensor]:
        """An image, and its truth on the grid that is counted; unknown where nothing counts."""
        image, truth = self._pixels(sample)
        if self.config.counted is not None:
            part = (..., *self.config.counted.slices(*_size(truth), sample.key))
            kept = torch.zeros_like(truth)
            kept[part] = truth[part]
            truth = kept
        return image, truth if self.config.labels is None else _nearest(truth, self.config.labels)

    def _keep(self, reader: Reader, head: nn.Module, folder: Path) -> None:
        """Writes the probe and the picture."""
        state = {name: value.contiguous() for name, value in head.state_dict().items()}
        save_file(state, folder / "probe.safetensors")
        samples = self.config.dataset.samples("test")
        columns: dict[str, list[Tensor]] = {"image": [], "truth": [], "probe": []}
        for sample in samples[:: max(1, len(samples) // SHOWN)][:SHOWN]:
            image, truth = self._test_pixels(sample)
            predicted = self.predict(reader, head, image, _size(truth)).cpu()
            columns["image"].append(image)
            columns["truth"].append(self.colours(truth, truth))
            columns["probe"].append(self.colours(predicted, truth))
        size = _size(columns["image"][0])
        stacked = {
            title: torch.stack([resize(each[None], size)[0] for each in panels])
            for title, panels in columns.items()
        }
        draw_columns(folder / "predictions.png", stacked)


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _nearest(truth: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(truth[None], size, mode="nearest-exact")[0]


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
