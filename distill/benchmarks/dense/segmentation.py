"""Semantic segmentation with a linear probe: BatchNorm and a 1 x 1 convolution on a frozen map.

The protocols of DINOv3 and RADIO are recipes of this (`recipes/evaluation/`). mIoU is that of the
whole test set, from one confusion matrix.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from data.labelled.segmentation import AnySegmentation
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.dense.confusion import class_ious, confusion_matrix, segmentation_scores
from distill.benchmarks.dense.label_pictures import draw_labels
from distill.benchmarks.dense.pixel_inference import predict
from distill.benchmarks.dense.pixel_samples import (
    InputConfig,
    LabelledPixels,
    ResolvedInput,
    resized,
    to_tensors,
)
from distill.benchmarks.dense.pixel_views import PixelViews, cross_entropy
from distill.benchmarks.dense.probe_training import ProbeConfig
from distill.benchmarks.sharing import own_share
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.teacher import Teacher
from teachers.upsamplers.resize import Size2d

SHOWN = 4  # test images of a picture


class SegmentationConfig(BenchmarkConfig):
    """A linear probe on a segmentation set.

    Attributes:
        dataset: where it lies, and in which layout.
        input: what the encoder sees.
        probe: how the head is trained.
        dropout: share of channels that is dropped before the head.
        loss_stride: the loss is taken at every n-th pixel along both axes.
        labels: (height, width) that test labels are resized to before they are counted; None for
            their own size. A coarser grid raises mIoU: figures on different grids do not compare.
        batch_size: windows of a test image that are encoded at once.
    """

    kind: str = "segmentation"
    dataset: AnySegmentation
    input: InputConfig = InputConfig()
    probe: ProbeConfig
    dropout: float = Field(0.0, ge=0, lt=1)
    loss_stride: PositiveInt = 1
    labels: Size2d | None = None
    batch_size: PositiveInt = 8


class LinearProbe(nn.Module):
    """Logits of each cell.

    Args:
        dim: channels of the map.
        num_classes: K.
        dropout: share of channels that is dropped.
    """

    def __init__(self, dim: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) to (B, K, h, w)."""
        return self.classifier(self.norm(self.dropout(maps)))


class Segmentation(Benchmark):
    """Trains the probe, then counts every pixel of the test images."""

    Config: ClassVar[type[BenchmarkConfig]] = SegmentationConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Figures in per cent: mIoU, the accuracy of pixels, and its mean over classes.

        The folder gets the probe, each class's IoU, predictions beside labels, and the mIoU of
        every learning rate: the best on the test images counts, as is published.
        """
        config: SegmentationConfig = self.config
        seen = config.input.resolved(encoder.spec)
        samples = config.dataset.samples("train")
        views = PixelViews(
            lambda number: to_tensors(*config.dataset.read(samples[number])),
            [sample.key for sample in samples],
            seen,
            config.probe,
        )
        heads = views.train(
            encoder,
            lambda dim: LinearProbe(dim, len(config.dataset.names), config.dropout),
            cross_entropy,
            config.loss_stride,
            seed,
            folder,
        )
        matrices = _count(config, seen, encoder, heads)
        scores = [segmentation_scores(matrix) for matrix in matrices]
        best = max(range(len(heads)), key=lambda i: scores[i]["miou"])
        if distributed.rank() == 0:
            _keep(folder, config, seen, encoder, heads[best], matrices[best])
            by_rate = {f"{r:g}": s["miou"] for r, s in zip(config.probe.lr, scores, strict=True)}
            (folder / "miou_by_lr.json").write_text(json.dumps(by_rate, indent=1))
        protocol = {
            "train_images": len(samples),
            "test_images": len(config.dataset.samples("test")),
            "classes": len(config.dataset.names),
            "input": seen.model_dump(mode="json"),
            "inference": "whole" if seen.stride is None else "slide",
            "metric_grid": "as labelled" if config.labels is None else list(config.labels),
        }
        return Measurement(scores[best], protocol)


def _count(
    config: SegmentationConfig, seen: ResolvedInput, encoder: Teacher, heads: Sequence[nn.Module]
) -> list[Tensor]:
    """The confusion matrix of each head, int64 (K, K), over all test images of all ranks."""
    samples, classes = config.dataset.samples("test"), len(config.dataset.names)
    device = encoder.mean.device
    matrices = torch.zeros(len(heads), classes, classes, dtype=torch.int64, device=device)
    numbers = own_share(len(samples))
    for number in tracked(numbers, "test images"):
        pixels = to_tensors(*config.dataset.read(samples[number]))
        labels = _labels(config, pixels).to(device)
        size = (labels.shape[0], labels.shape[1])
        logits = predict(encoder, heads, pixels.image, seen, size, config.batch_size)
        for matrix, each in zip(matrices, logits, strict=True):
            matrix += confusion_matrix(each.argmax(0), labels, classes)
    distributed.all_reduce(matrices)
    return list(matrices.cpu())


def _labels(config: SegmentationConfig, pixels: LabelledPixels) -> Tensor:
    """Labels on the grid that is counted."""
    return pixels.labels if config.labels is None else resized(pixels, config.labels).labels


def _keep(
    folder: Path,
    config: SegmentationConfig,
    seen: ResolvedInput,
    encoder: Teacher,
    head: nn.Module,
    matrix: Tensor,
) -> None:
    """Writes the probe, each class's IoU and the picture."""
    save_file(
        {k: v.contiguous() for k, v in head.state_dict().items()}, folder / "probe.safetensors"
    )
    ious = dict(zip(config.dataset.names, class_ious(matrix), strict=True))
    (folder / "iou.json").write_text(json.dumps(ious, indent=1))
    samples = config.dataset.samples("test")
    shown = []
    for sample in samples[:: max(1, len(samples) // SHOWN)][:SHOWN]:
        pixels = to_tensors(*config.dataset.read(sample))
        size = (pixels.labels.shape[0], pixels.labels.shape[1])
        logits = predict(encoder, [head], pixels.image, seen, size, config.batch_size)
        shown.append((pixels.image, pixels.labels, logits[0].argmax(0).cpu()))
    draw_labels(folder / "predictions.png", shown, config.dataset.names)
