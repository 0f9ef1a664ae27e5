"""A probe of every pixel: trains heads on a frozen encoder, counts the test images, keeps the best.

One head is trained for each learning rate of the recipe. The best rate on the test images counts,
as is published; where a probe has several tasks, each takes the rate that is best for it.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from data.errors import DataError
from distill.benchmarks.benchmark import Benchmark, Measurement, metric_key
from distill.benchmarks.dense.counters import Counter
from distill.benchmarks.dense.heads import TaskHeads
from distill.benchmarks.dense.pixel_samples import LabelledPixels
from distill.benchmarks.dense.pixel_task import PixelTask, TaskGroup
from distill.benchmarks.dense.probe_images import ProbeImages
from distill.benchmarks.dense.probe_training import probe_features, train_heads
from distill.benchmarks.sharing import gather_shares, own_share
from distill.display.pictures import draw_columns
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.teacher import Teacher

SHOWN = 4  # test images of a picture


class Candidate(NamedTuple):
    """The heads of one learning rate, or a constant prediction, counted on the test images.

    Attributes:
        name: the rate, or what the constant is.
        counters: by task.
        metrics: by task.
    """

    name: str
    counters: dict[str, Counter]
    metrics: dict[str, dict[str, float]]


class DenseProbe(Benchmark):
    """A benchmark of `PixelTask`s: segmentation, depth, normals and several at once declare theirs.

    The config of a subclass has a `dataset`, a `probe` and a `loss_stride`.
    """

    @abstractmethod
    def tasks(self) -> Sequence[PixelTask]:
        """The tasks; metrics are prefixed by the task's name where there are several."""

    @abstractmethod
    def read(self, sample: Any) -> LabelledPixels:
        """An image of the data set as it is stored, and the truth of all tasks, (C, H, W)."""

    @abstractmethod
    def images(self, encoder: Teacher, tasks: TaskGroup) -> ProbeImages:
        """The way of the images to an encoder."""

    @abstractmethod
    def tables(self, candidates: Sequence[Candidate], best: Sequence[Candidate]) -> dict[str, Any]:
        """The content of JSON files by name; every rank calls this.

        Args:
            candidates: the learning rates in their order, then the constants.
            best: the best learning rate of each task.
        """

    def constants(self) -> dict[str, Tensor]:
        """Predictions (C, h, w) that depend on no test image, to compare with, by name."""
        return {}

    def facts(self, known: Tensor) -> dict[str, Any]:
        """Protocol entries from the known pixels of each test image and task, int64 (N, tasks)."""
        return {}

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """The metrics of each task's best learning rate; see `Benchmark.measure`.

        The folder gets the best heads, the metrics of all rates, and predictions beside truth.
        """
        group = TaskGroup(self.tasks())
        images = self.images(encoder, group)
        heads = self._train(images, group, seed, folder)
        candidates, known = self._count(images, group, heads)
        rates, constants = candidates[: len(heads)], candidates[len(heads) :]
        places = [task.best([c.metrics[task.name] for c in rates]) for task in group.tasks]
        best = [rates[place] for place in places]
        chosen = TaskHeads(heads[place].heads[n] for n, place in enumerate(places)).eval()
        self._keep(images, group, chosen, self.tables(candidates, best), folder)
        metrics: dict[str, float] = {}
        for task, candidate in zip(group.tasks, best, strict=True):
            prefix, values = group.metric_prefix(task), candidate.metrics[task.name]
            metrics |= {f"{prefix}{name}": value for name, value in values.items()}
            for each in constants:
                value = each.metrics[task.name][task.headline]
                metrics[f"{metric_key(each.name)}_{prefix}{task.headline}"] = value
        counts = {f"{s}_images": len(self.config.dataset.samples(s)) for s in ("train", "test")}
        return Measurement(metrics, counts | self.facts(known) | images.protocol)

    def _train(
        self, images: ProbeImages, group: TaskGroup, seed: int, folder: Path
    ) -> list[TaskHeads]:
        """The heads of each learning rate."""
        probe, stride = self.config.probe, self.config.loss_stride
        places = (..., slice(stride // 2, None, stride), slice(stride // 2, None, stride))

        def sample(number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
            image, truth = images.view(number, generator)
            if truth.shape[-2:] != images.size:
                raise DataError(
                    f"input: '{images.key(number)}' is {tuple(truth.shape[-2:])} px, the first "
                    f"image {images.size}; set {images.size_keys} to bring all to one size"
                )
            return image, truth[places]

        def loss(predicted: Tensor, truth: Tensor, step: int) -> Tensor:
            return group.loss(images.on_pixels(predicted, stride), truth, step)

        features = probe_features(probe, sample, images.encode, len(images), seed, folder)
        return train_heads(
            lambda: group.build(images.dims), probe, features, loss, len(images), seed
        )

    def _count(
        self, images: ProbeImages, group: TaskGroup, heads: Sequence[TaskHeads]
    ) -> tuple[list[Candidate], Tensor]:
        """All candidates on the test images of all ranks, and the known pixels, (N, tasks)."""
        samples, device = self.config.dataset.samples("test"), images.encoder.mean.device
        constants = self.constants()
        names = [*(f"{rate:g}" for rate in self.config.probe.lr), *constants]
        counters = [group.counters(len(samples), device) for _ in names]
        own = own_share(len(samples))
        known = torch.zeros(len(own), len(group.tasks), dtype=torch.int64, device=device)
        for row, number in zip(known, tracked(own, "test images"), strict=True):
            image, truth = images.test(samples[number])
            truth, size = truth.to(device), (truth.shape[-2], truth.shape[-1])
            predicted = images.predict(heads, image, size)
            for each in constants.values():
                enlarged = F.interpolate(each[None].to(device), size, mode="bilinear")
                predicted.append(group.decode_means(enlarged)[0])
            row.copy_(group.known(truth).flatten(1).sum(1))
            for of_candidate, maps in zip(counters, predicted, strict=True):
                group.add(of_candidate, maps, truth)
        known = gather_shares(known, len(samples)).cpu()
        for task, total in zip(group.tasks, known.sum(0).tolist(), strict=True):
            if not total:
                raise DataError(f"dataset: no test image has a known pixel of {task.name}")
        candidates = []
        for name, each in zip(names, counters, strict=True):
            metrics = {task.name: task.metrics(each[task.name]) for task in group.tasks}
            candidates.append(Candidate(name, each, metrics))
        return candidates, known

    def _keep(
        self,
        images: ProbeImages,
        group: TaskGroup,
        heads: TaskHeads,
        tables: dict[str, Any],
        folder: Path,
    ) -> None:
        """Writes the best heads, the tables and the picture."""
        if distributed.rank() != 0:
            return
        state = {
            name: value.contiguous()
            for task, head in zip(group.tasks, heads.heads, strict=True)
            for name, value in head.state_dict(prefix=group.state_prefix(task)).items()
        }
        save_file(state, folder / "probe.safetensors")
        for name, table in tables.items():
            (folder / name).write_text(json.dumps(table, indent=1))
        samples = self.config.dataset.samples("test")
        shown = samples[:: max(1, len(samples) // SHOWN)][:SHOWN]
        self.draw(images, group, heads, shown, folder / "predictions.png")

    def draw(
        self,
        images: ProbeImages,
        group: TaskGroup,
        heads: TaskHeads,
        samples: Sequence[Any],
        path: Path,
    ) -> None:
        """Draws a row for each test image: the image, then truth and prediction of each task."""
        columns: dict[str, list[Tensor]] = {"image": []}
        for sample in samples:
            image, truth = images.test(sample)
            (predicted,) = images.predict([heads], image, (truth.shape[-2], truth.shape[-1]))
            columns["image"].append(image)
            parts = zip(group.tasks, group.split(truth), group.split(predicted.cpu()), strict=True)
            for task, of_truth, of_probe in parts:
                titles = group.titles(task)
                columns.setdefault(titles[0], []).append(task.colours(of_truth, of_truth))
                columns.setdefault(titles[1], []).append(task.colours(of_probe, of_truth))
        draw_columns(path, columns)
