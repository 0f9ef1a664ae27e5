"""A probe of every pixel: trains heads on a frozen encoder, counts the test images, keeps the best.

One head is trained for each learning rate of the recipe. The best rate counts, on training images
that the recipe withholds or else on the test images (`ProbeConfig.withheld`); where a probe has
several tasks, each takes the rate that is best for it.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import DataError
from distill.benchmarks.benchmark import Benchmark, Measurement, metric_key
from distill.benchmarks.dense.counters import Counter
from distill.benchmarks.dense.heads import TaskHeads
from distill.benchmarks.dense.pixel_samples import LabelledPixels
from distill.benchmarks.dense.pixel_task import PixelTask, TaskGroup
from distill.benchmarks.dense.probe_images import ProbeImages
from distill.benchmarks.dense.probe_training import (
    Batches,
    ProbeConfig,
    ReadView,
    probe_batches,
    train_heads,
)
from distill.benchmarks.sharing import gather_shares, own_share
from distill.display.columns import Column, draw_columns
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.files import save_tensors
from teachers.fingerprint import teacher_fingerprint
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
    """A benchmark of one or several `PixelTask`s, which subclasses declare.

    The config of a subclass has `dataset`, `probe`, `loss_stride` and `labels`, the (height,
    width) that the truth of test images is resized to, or None.
    """

    _encoded: tuple[str, Batches] | None = None  # cached features, by the encoder's fingerprint

    @abstractmethod
    def tasks(self) -> Sequence[PixelTask]:
        """The tasks; metrics are prefixed by the task's name where there are several."""

    @abstractmethod
    def read(self, sample: Any) -> LabelledPixels:
        """An image of the data set as it is stored, and the truth of all tasks, (C, H, W)."""

    @abstractmethod
    def images(self, encoder: Teacher, tasks: TaskGroup) -> ProbeImages:
        """The training views and test images for an encoder."""

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

    def check(self, encoder: Teacher) -> None:
        """Checks sizes and layers for an image of each split; see `Benchmark.check`."""
        images = self.images(encoder, TaskGroup(self.tasks()))
        images.check(self.config.dataset.samples("test")[0])

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """The metrics of each task's best learning rate; see `Benchmark.measure`.

        The folder gets the best heads, the metrics of all rates, and predictions beside truth.
        """
        group, probe = TaskGroup(self.tasks()), self.config.probe
        images = self.images(encoder, group)
        trial = self._compare(images, group, seed, folder) if probe.withheld else None
        if trial is not None:
            chosen = {trial[place].name for place in _best_places(group, trial)}
            kept = [rate for rate in probe.lr if f"{rate:g}" in chosen]
            probe = probe.model_copy(update={"lr": tuple(kept)})
        heads = self._train(images, group, probe, len(images), seed, folder)
        samples, constants = self.config.dataset.samples("test"), self.constants()
        rates, known = self._count(images, group, heads, probe, samples, constants)
        rates, others = rates[: len(heads)], rates[len(heads) :]
        if trial is None:
            places = _best_places(group, rates)
        else:
            names = [each.name for each in rates]
            places = [names.index(trial[place].name) for place in _best_places(group, trial)]
        best = [rates[place] for place in places]
        tables = self.tables([*rates, *others], best)
        if trial is not None:
            tables["withheld.json"] = {each.name: each.metrics for each in trial}
        heads_of_best = (heads[place].heads[n] for n, place in enumerate(places))
        self._keep(images, group, TaskHeads(heads_of_best).eval(), tables, folder)
        counts = {f"{s}_images": len(self.config.dataset.samples(s)) for s in ("train", "test")}
        return Measurement(
            _metrics(group, best, others), counts | self.facts(known) | images.protocol
        )

    def _compare(
        self, images: ProbeImages, group: TaskGroup, seed: int, folder: Path
    ) -> list[Candidate]:
        """All rates on withheld training images, trained on the others.

        Raises:
            DataError: nothing is withheld, or all.
        """
        probe, count = self.config.probe, len(images.samples)
        kept = count - round(probe.withheld * count)
        if not 0 < kept < count:
            raise DataError(
                f"probe.withheld: {probe.withheld:g} of {count} training images leaves "
                f"{kept} to train on and {count - kept} to compare rates on"
            )
        heads = self._train(images, group, probe, images.num_views(kept), seed, folder)
        return self._count(images, group, heads, probe, images.samples[kept:], {})[0]

    def _train(
        self,
        images: ProbeImages,
        group: TaskGroup,
        probe: ProbeConfig,
        count: int,
        seed: int,
        folder: Path,
    ) -> list[TaskHeads]:
        """The heads of each learning rate of `probe`, on the first `count` views."""
        stride = self.config.loss_stride
        places = (..., slice(stride // 2, None, stride), slice(stride // 2, None, stride))

        def sample(number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
            image, truth = images.view(number, generator)
            if truth.shape[-2:] != images.size:
                key = images.key(images.samples[number])
                raise DataError(
                    f"input: '{key}' is {tuple(truth.shape[-2:])} px, the first image "
                    f"{images.size}; set {images.size_keys} to bring all to one size"
                )
            return image, truth[places]

        def loss(predicted: Tensor, truth: Tensor, step: int) -> Tensor:
            return group.loss(images.on_pixels(predicted, stride), truth, step)

        batches = self._batches(images, sample, seed, folder)
        return train_heads(lambda: group.build(images.dims), probe, batches, loss, count, seed)

    def _batches(self, images: ProbeImages, sample: ReadView, seed: int, folder: Path) -> Batches:
        """Batches of a seed; features that are cached are encoded once for all seeds."""
        probe, count = self.config.probe, len(images)
        if probe.mode == "online":
            return probe_batches(probe, sample, images.encode, count, seed, folder)
        fingerprint = teacher_fingerprint(images.encoder)
        if self._encoded is None or self._encoded[0] != fingerprint:
            self._encoded = None  # frees the file of the last encoder first
            made = probe_batches(probe, sample, images.encode, count, seed, folder)
            self._encoded = fingerprint, made
        return self._encoded[1]

    def _count(
        self,
        images: ProbeImages,
        group: TaskGroup,
        heads: Sequence[TaskHeads],
        probe: ProbeConfig,
        samples: Sequence[Any],
        constants: Mapping[str, Tensor],
    ) -> tuple[list[Candidate], Tensor]:
        """All candidates on samples, shared by the ranks, and the known pixels, (N, tasks)."""
        device = images.encoder.mean.device
        names = [*(f"{rate:g}" for rate in probe.lr), *constants]
        counters = [{t.name: t.counter(len(samples), device) for t in group.tasks} for _ in names]
        own = own_share(len(samples))
        known = torch.zeros(len(own), len(group.tasks), dtype=torch.int64, device=device)
        for row, number in zip(known, tracked(own, "test images"), strict=True):
            image, truth = images.test(samples[number])
            truth, size = truth.to(device), (truth.shape[-2], truth.shape[-1])
            row.copy_(torch.stack([task.known(part).sum() for task, part in group.parts(truth)]))
            predicted = images.predict(heads, image, size)
            for each in constants.values():
                enlarged = F.interpolate(each[None].to(device), size, mode="bilinear")
                predicted.append(group.decode_means(enlarged)[0])
            for by_task, maps in zip(counters, predicted, strict=True):
                for task, of_probe, of_truth in group.parts(maps, truth):
                    by_task[task.name].add(of_probe, of_truth)
        known = gather_shares(known, len(samples)).cpu()
        for task, total in zip(group.tasks, known.sum(0).tolist(), strict=True):
            if not total:
                raise DataError(
                    f"dataset: none of {len(samples)} images that are counted has a known pixel "
                    f"of {task.name}"
                )
        candidates = []
        for name, by_task in zip(names, counters, strict=True):
            metrics = {task.name: task.metrics(by_task[task.name]) for task in group.tasks}
            candidates.append(Candidate(name, by_task, metrics))
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
            name: value
            for task, head in zip(group.tasks, heads.heads, strict=True)
            for name, value in head.state_dict(prefix=group.prefix(task, "tasks.{}.")).items()
        }
        save_tensors(folder / "probe.safetensors", state, {})
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
            for task, of_truth, of_probe in group.parts(truth, predicted.cpu()):
                title = group.prefix(task, "{}")
                names = title or "truth", f"{title}: probe" if title else "probe"
                for name, maps in zip(names, (of_truth, of_probe), strict=True):
                    columns.setdefault(name, []).append(task.colours(maps, of_truth))
        draw_columns(path, [Column(t, p, smooth=t == "image") for t, p in columns.items()])


def _best_places(group: TaskGroup, rates: Sequence[Candidate]) -> list[int]:
    """The position of the best rate of each task."""
    return [task.best([each.metrics[task.name] for each in rates]) for task in group.tasks]


def _metrics(
    group: TaskGroup, best: Sequence[Candidate], constants: Sequence[Candidate]
) -> dict[str, float]:
    """All metrics of each task's best rate, and the headline of the constants."""
    metrics: dict[str, float] = {}
    for task, candidate in zip(group.tasks, best, strict=True):
        prefix, values = group.prefix(task, "{}_"), candidate.metrics[task.name]
        metrics |= {f"{prefix}{name}": value for name, value in values.items()}
        for each in constants:
            value = each.metrics[task.name][task.headline]
            metrics[f"{metric_key(each.name)}_{prefix}{task.headline}"] = value
    return metrics
