"""Training of a detector on a frozen encoder; every image is encoded when it is used.

The ranks share each batch and sum their gradients, so that all have the same detector, on any
number of ranks the same up to rounding.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torchvision.models.detection import FCOS

from data.batch import scale_pixels
from data.labelled.detection import (
    AnnotatedImage,
    DetectionSet,
    Placement,
    place_on_canvas,
    read_annotated,
)
from data.read_ahead import read_ahead
from distill.benchmarks.detection.detector import build_detector, levels_of, source_maps
from distill.benchmarks.sharing import own_share
from distill.engine.optimizer import OptimizerConfig, build_optimizer, decay_groups
from distill.engine.schedule import ScheduleConfig, scheduled_ratio
from distill.runtime import distributed
from distill.runtime.progress import tracked
from distill.targets.target_statistics import merge_over_ranks
from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.phi_s import FeatureStatistics
from teachers.teacher import Teacher


class DetectorTrainingConfig(StrictConfig):
    """How the detector trains.

    Attributes:
        steps: optimiser steps.
        batch_size: images of a step, over all ranks.
        optimizer: of the pyramid and the heads; the encoder is frozen.
        schedule: of the learning rate.
        channels: of the pyramid and of the heads.
        flip: probability that a training image is mirrored.
        statistics_images: training images for the statistics that standardise the map's channels.
    """

    steps: PositiveInt = 88_000
    batch_size: PositiveInt = 16
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, weight_decay=0.1)
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=500)
    channels: Annotated[int, Field(gt=0, multiple_of=32)] = 256
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    statistics_images: PositiveInt = 256


class FittedImage(NamedTuple):
    """An image on its canvas, with the boxes to train on.

    Attributes:
        pixels: uint8 (3, H, W).
        placement: of the image on the canvas.
        boxes: (N, 4) on the canvas, left, top, right, bottom; no crowds.
        labels: (N,) int64.
    """

    pixels: Tensor
    placement: Placement
    boxes: Tensor
    labels: Tensor


def fit_image(image: AnnotatedImage, size: tuple[int, int], flipped: bool) -> FittedImage:
    """Reads an image and places it and its boxes on a canvas of (height, width) pixels.

    Crowds are left out, and boxes without area, of which COCO has a few.
    """
    pixels, placement = place_on_canvas(read_annotated(image), size, flipped=flipped)
    marks = image.objects
    solid = (marks.boxes[:, 2:] > marks.boxes[:, :2]).all(1) & ~marks.crowds
    return FittedImage(
        torch.from_numpy(pixels).permute(2, 0, 1),
        placement,
        torch.from_numpy(placement.to_canvas(marks.boxes[solid])).float(),
        torch.from_numpy(marks.labels[solid]),
    )


def train_detector(
    encoder: Teacher,
    train: DetectionSet,
    size: tuple[int, int],
    config: DetectorTrainingConfig,
    seed: int,
) -> FCOS:
    """Trains a detector; every rank calls this and returns the same.

    Args:
        encoder: frozen, on this process's device.
        train: images with at least one class.
        size: (height, width) in pixels that the encoder takes.
        config: of the training.
        seed: of the initial weights, the order of the images and the flips.

    Raises:
        TeacherError: the loss became infinite or NaN.
    """
    detector = build_detector(
        encoder,
        _channel_statistics(encoder, train, size, config, seed),
        size=size,
        num_classes=len(train.classes),
        channels=config.channels,
        seed=distributed.derive_seed(seed, "detector"),
    ).train()
    trained = nn.ModuleList([detector.backbone.pyramid, detector.head])
    optimizer = build_optimizer(config.optimizer, decay_groups(trained, config.optimizer, set()))
    draws, own = training_draws(len(train.images), config, seed), own_share(config.batch_size)
    mine = [draws[step * config.batch_size + i] for step in range(config.steps) for i in own]
    fitted = read_ahead(lambda draw: fit_image(train.images[draw[0]], size, draw[1]), mine)
    for step in tracked(range(config.steps), "training the detector"):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * scheduled_ratio(config.schedule, step, config.steps)
        loss = batch_loss(detector, [next(fitted) for _ in own])
        if not loss.detach().isfinite():
            raise TeacherError(
                f"the detector's loss is {loss.item()} at step {step}; try an optimizer.lr below "
                f"{config.optimizer.lr:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        add_gradients(trained)
        optimizer.step()
    return detector


def batch_loss(detector: FCOS, batch: Sequence[FittedImage]) -> Tensor:
    """This rank's part of the batch's loss, which is the sum of the ranks' parts."""
    device = distributed.device()
    targets = [{"boxes": b.boxes.to(device), "labels": b.labels.to(device)} for b in batch]
    losses = detector(list(stack_pixels(batch)), targets)
    return torch.stack(list(losses.values())).sum()


def add_gradients(module: nn.Module) -> None:
    """Sums the gradients of all ranks, so that every rank takes the step of the whole batch."""
    if distributed.world_size() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    summed = distributed.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def training_draws(count: int, config: DetectorTrainingConfig, seed: int) -> list[tuple[int, bool]]:
    """The number of each image of each batch, and whether it is mirrored, for any number of ranks.

    Every epoch has all images in random order. Batches cross the ends of epochs, so that all are
    full.
    """
    generator = torch.Generator().manual_seed(distributed.derive_seed(seed, "detection order"))
    total = config.steps * config.batch_size
    epochs = -(-total // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])[:total]
    flips = torch.rand(total, generator=generator) < config.flip
    return list(zip(order.tolist(), flips.tolist(), strict=True))


def stack_pixels(batch: Sequence[FittedImage]) -> Tensor:
    """(B, 3, H, W) in [0, 1] on this process's device."""
    return scale_pixels(torch.stack([image.pixels for image in batch]), distributed.device())


@torch.no_grad()
def _channel_statistics(
    encoder: Teacher,
    train: DetectionSet,
    size: tuple[int, int],
    config: DetectorTrainingConfig,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each source's channels over random images, (D,) float64."""
    generator = torch.Generator().manual_seed(distributed.derive_seed(seed, "statistics"))
    chosen = torch.randperm(len(train.images), generator=generator)[: config.statistics_images]
    own = own_share(len(chosen))
    levels, device = levels_of(encoder, size), distributed.device()
    # A map of no picture tells the channels, also to a rank that has no image.
    empty = source_maps(encoder, torch.zeros(1, 3, *size, device=device), levels)
    found = [FeatureStatistics.zeros(each.shape[1], device=device) for each in empty]
    fitted = read_ahead(lambda i: fit_image(train.images[int(chosen[i])], size, flipped=False), own)
    for start in tracked(range(0, len(own), config.batch_size), "standardising"):
        batch = [next(fitted) for _ in own[start : start + config.batch_size]]
        maps = source_maps(encoder, stack_pixels(batch), levels)
        for statistics, each in zip(found, maps, strict=True):
            statistics.update(each)
    merged = [merge_over_ranks(statistics) for statistics in found]
    return [(m.mean, (m.scatter.diagonal() / m.count).sqrt()) for m in merged]
