"""Multi-task Pascal Context and NYUDv2: a linear probe a task, all on one frozen map.

Data, losses (but for one, see `multitask_tasks.Normals`), their weights and the size of the input
are those of the published comparisons of multi-task decoders; the probes are ours, BatchNorm and
a 1 x 1 convolution a task. So the figures are NOT those of MLoRE, which trains a large decoder:
compare them with figures of this benchmark only. The F measure is that of probabilities, where
MLoRE's code takes their sigmoid once more.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from data.batch import scale_pixels
from data.errors import DataError
from data.labelled.files import IGNORED
from data.labelled.multitask import MultiTaskLayout
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.dense.geometry_heads import LinearHead
from distill.benchmarks.dense.multitask_tasks import PixelTask, build_tasks
from distill.benchmarks.dense.pixel_inference import predict
from distill.benchmarks.dense.pixel_samples import InputConfig, LabelledPixels
from distill.benchmarks.dense.pixel_views import PixelViews
from distill.benchmarks.dense.probe_training import ProbeConfig
from distill.benchmarks.sharing import own_share
from distill.display.pictures import draw_columns
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.teacher import Teacher

SHOWN = 4  # test images of a picture


class MultiTaskConfig(BenchmarkConfig):
    """Linear probes of all tasks of a set.

    Attributes:
        dataset: where it lies, and in which layout.
        input: what the encoder sees. A test image smaller than `crop` is padded to it where
            `stride` is given.
        probe: how the heads are trained. They share nothing but the map, so that the published
            weights of their losses count for `sgd` and `clip` only.
        loss_stride: losses are taken at every n-th pixel along both axes.
        batch_size: windows of a test image that are encoded at once.
    """

    kind: str = "multitask"
    dataset: MultiTaskLayout
    input: InputConfig = InputConfig()
    probe: ProbeConfig
    loss_stride: PositiveInt = 1
    batch_size: PositiveInt = 8


class MultiTaskProbe(nn.Module):
    """A linear head a task.

    Args:
        dim: channels of the map.
        outputs: name of a task to its channels.
    """

    def __init__(self, dim: int, outputs: dict[str, int]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict({name: LinearHead(dim, n) for name, n in outputs.items()})

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) to the predictions of all tasks, (B, sum of outputs, h, w)."""
        return torch.cat([head(maps) for head in self.tasks.values()], dim=1)


class MultiTask(Benchmark):
    """Trains the probes of all tasks at once, then counts every known pixel of the test images."""

    Config: ClassVar[type[BenchmarkConfig]] = MultiTaskConfig
    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        {"normals_mean_angle_pooled", "depth_rmse_pooled"}
    )
    config: MultiTaskConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Figures of each task, each of the learning rate that is best for it on the test images.

        `semseg_miou`, `parts_miou` and `saliency_max_f` in per cent, `normals_mean_angle_pooled`
        in degrees and `depth_rmse_pooled` in metres, as far as the set has the tasks. mIoU leaves
        out classes that neither occur nor are predicted; `*_absent_as_0` does not, as published.
        The folder gets the probes, the figures of every rate and predictions beside truth.
        """
        run = _Run(self.config, encoder)
        heads = run.train(seed, folder)
        by_head, counted = run.count(heads)
        best = [_best(task, by_head) for task in run.tasks]
        if distributed.rank() == 0:
            rates = (f"{rate:g}" for rate in self.config.probe.lr)
            by_rate = dict(zip(rates, by_head, strict=True))
            (folder / "figures.json").write_text(json.dumps(by_rate, indent=1))
            run.keep([heads[place] for place in best], folder)
        figures = {
            f"{task.name}_{figure}": value
            for task, place in zip(run.tasks, best, strict=True)
            for figure, value in by_head[place][task.name].items()
        }
        protocol = {
            "train_images": len(self.config.dataset.names("train")),
            "test_images": len(self.config.dataset.names("test")),
            "counted_pixels": counted,
            "input": run.seen.model_dump(mode="json"),
            "inference": "whole" if run.seen.stride is None else "slide",
            "metric_grid": "as labelled",
        }
        return Measurement(figures, protocol)


class _Run:
    """One encoder on one set: the truth of all tasks is (C, H, W), in their order."""

    def __init__(self, config: MultiTaskConfig, encoder: Teacher) -> None:
        self.config, self.encoder = config, encoder
        self.seen = config.input.resolved(encoder.spec)
        self.tasks = build_tasks(config.dataset)

    def train(self, seed: int, folder: Path) -> list[nn.Module]:
        """A `MultiTaskProbe` for each learning rate."""
        config, names = self.config, self.config.dataset.names("train")
        outputs = {task.name: task.outputs for task in self.tasks}
        views = PixelViews(
            lambda number: self._pixels(names[number]), names, self.seen, config.probe, self._adapt
        )
        return views.train(
            self.encoder,
            lambda dim: MultiTaskProbe(dim, outputs),
            self._loss,
            config.loss_stride,
            seed,
            folder,
        )

    def count(
        self, heads: Sequence[nn.Module]
    ) -> tuple[list[dict[str, dict[str, float]]], dict[str, int]]:
        """The figures of each head by task, and how many pixels each task counted.

        Raises:
            DataError: no test image has a known pixel of a task.
        """
        names, device = self.config.dataset.names("test"), self.encoder.mean.device
        counters = [[task.counter(len(names), device) for task in self.tasks] for _ in heads]
        known = torch.zeros(len(self.tasks), dtype=torch.int64, device=device)
        numbers = own_share(len(names))
        for number in tracked(numbers, "test images"):
            pixels = self._pixels(names[number])
            truths = self._truths(pixels.labels.to(device))
            known += torch.stack([(truth[0] != IGNORED).sum() for truth in truths])
            for of_head, decided in zip(counters, self._predict(heads, pixels), strict=True):
                for counter, each, truth in zip(of_head, decided, truths, strict=True):
                    counter.add(each, truth)
        tasks = [task.name for task in self.tasks]
        counted = dict(zip(tasks, distributed.all_reduce(known).tolist(), strict=True))
        for task, number in counted.items():
            if not number:
                root = self.config.dataset.root
                raise DataError(f"{root}: no test image has a known pixel of {task}")
        by_head = [
            {task: counter.figures() for task, counter in zip(tasks, of_head, strict=True)}
            for of_head in counters
        ]
        return by_head, counted

    def keep(self, chosen: Sequence[nn.Module], folder: Path) -> None:
        """Writes each task's probe, of its own best rate, and the picture."""
        state = {
            name: value.contiguous()
            for task, head in zip(self.tasks, chosen, strict=True)
            for name, value in head.state_dict().items()
            if name.startswith(f"tasks.{task.name}.")
        }
        save_file(state, folder / "probe.safetensors")
        outputs = {task.name: task.outputs for task in self.tasks}
        probe = MultiTaskProbe(self.encoder.spec.spatial_dim, outputs).to(self.encoder.mean.device)
        probe.load_state_dict(state)
        names = self.config.dataset.names("test")
        columns: dict[str, list[Tensor]] = {"image": []}
        for name in names[:: max(1, len(names) // SHOWN)][:SHOWN]:
            pixels = self._pixels(name)
            columns["image"].append(pixels.image)
            (decided,) = self._predict([probe.eval()], pixels)
            for task, truth, each in zip(
                self.tasks, self._truths(pixels.labels), decided, strict=True
            ):
                columns.setdefault(task.name, []).append(task.colours(truth))
                columns.setdefault(f"{task.name}: probe", []).append(task.colours(each.cpu()))
        size = columns["image"][0].shape[-2:]  # nearest: blended colours would be other classes
        stacked = {
            title: torch.cat([F.interpolate(p[None], size, mode="nearest-exact") for p in panels])
            for title, panels in columns.items()
        }
        draw_columns(folder / "predictions.png", stacked)

    def _pixels(self, name: str) -> LabelledPixels:
        """An image and its truth."""
        sample = self.config.dataset.sample(name)
        image = scale_pixels(torch.tensor(sample.image).permute(2, 0, 1))
        return LabelledPixels(image, torch.cat([task.truth(sample) for task in self.tasks]))

    def _truths(self, truth: Tensor) -> Sequence[Tensor]:
        return truth.split([task.channels for task in self.tasks], dim=-3)

    def _predictions(self, predicted: Tensor) -> Sequence[Tensor]:
        return predicted.split([task.outputs for task in self.tasks], dim=-3)

    def _adapt(self, truth: Tensor, ratio: float, mirrored: bool) -> Tensor:
        parts = zip(self.tasks, self._truths(truth), strict=True)
        return torch.cat([task.adapt(part, ratio, mirrored) for task, part in parts])

    def _loss(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The weighted sum of all tasks' losses."""
        parts = zip(self.tasks, self._predictions(predicted), self._truths(truth), strict=True)
        return torch.stack([task.weight * task.loss(p, t) for task, p, t in parts]).sum()

    def _predict(self, heads: Sequence[nn.Module], pixels: LabelledPixels) -> list[list[Tensor]]:
        """What counts of the prediction for an image: for each head the tasks' (C, H, W)."""
        raw = predict(
            self.encoder,
            heads,
            pixels.image,
            self.seen,
            pixels.size,
            self.config.batch_size,
            averaged=lambda values: values,
        )
        return [
            [task.decided(p) for task, p in zip(self.tasks, self._predictions(each), strict=True)]
            for each in raw
        ]


def _best(task: PixelTask, by_head: Sequence[dict[str, dict[str, float]]]) -> int:
    """The number of the head that is best at a task."""
    sign = 1 if task.lower_is_better else -1
    return min(range(len(by_head)), key=lambda i: sign * by_head[i][task.name][task.headline])
