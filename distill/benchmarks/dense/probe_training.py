"""Training of probes: small heads on the maps of a frozen encoder.

Online, each step augments and encodes its images. Cached, every image is encoded once, without
augmentation, and steps read the stored features: faster, and another protocol. Several learning
rates train in one pass, one head for each. The ranks share the encoding; then every rank trains
the same heads on the whole batch, including the statistics of their batch norms.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn

from distill.benchmarks.sharing import gather_shares, own_share
from distill.engine.schedule import ScheduleConfig, scheduled_ratio
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.runtime.progress import tracked
from teachers.config import StrictConfig
from teachers.errors import TeacherError

Head = TypeVar("Head", bound=nn.Module)
# An image (3, H, W) in [0, 1] and its target, each of one size for all images. They are augmented
# with the generator where one is given.
ReadView = Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]
EncodeImages = Callable[[Tensor], tuple[Tensor, ...]]  # images (B, 3, H, W) to maps (B, D, h, w)
Loss = Callable[[Tensor, Tensor, int], Tensor]  # prediction, target, 0-based step
# Numbers of B images and a 0-based step to the inputs of the heads, each (B, ...), and the targets
# (B, ...), the same on every rank.
Batches = Callable[[Sequence[int], int], tuple[tuple[Tensor, ...], Tensor]]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class ProbeConfig(StrictConfig):
    """How a probe is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: images of a step, over all ranks.
        optimizer: `adamw`, or `sgd` with momentum 0.9.
        lr: peak learning rate, or several, of which the best counts, see `withheld`.
        withheld: share of the training images, the last ones, on which rates are compared; the best
            rate then trains on all images. Neighbouring frames of a video are alike, so the share
            is not drawn. 0 compares on the test images, as in DINOv2: published, but optimistic.
        weight_decay: of all parameters.
        warmup_steps: steps of linear warmup, fewer than `steps`.
        schedule: of the decay after that, to almost zero at the last step.
        clip: largest norm of a head's gradient; None for no limit.
        mode: `online`, or `cached` for features that are encoded once, without augmentation.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_listed), Field(min_length=1)]
    withheld: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["linear", "cosine"] = "linear"
    clip: PositiveFloat | None = None
    mode: Literal["online", "cached"] = "online"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps: expected fewer than steps ({self.steps}), got {self.warmup_steps}"
            )
        if len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr: expected different rates, got {list(self.lr)}")
        if self.withheld and len(self.lr) == 1:
            raise ValueError("withheld: compares learning rates; lr has only one")
        return self

    def rate_ratio(self, step: int) -> float:
        """The learning rate of a 0-based step as a share of its peak."""
        falling = ScheduleConfig(kind=self.schedule, warmup_steps=self.warmup_steps)
        return scheduled_ratio(falling, step, self.steps)


def online_batches(sample: ReadView, encode: EncodeImages, seed: int) -> Batches:
    """Batches that are augmented and encoded when they are needed.

    Args:
        sample: reads an image.
        encode: the encoder, on this process's device.
        seed: of the augmentation, which depends only on this and on the place in the training.
    """

    def batch(numbers: Sequence[int], step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        reads = []
        for place, number in enumerate(numbers):
            chosen = distributed.derive_seed(seed, "augmentation", step, place)
            reads.append(partial(sample, number, torch.Generator().manual_seed(chosen)))
        return _encode_shares(reads, encode)

    return batch


def cached_batches(
    sample: ReadView, encode: EncodeImages, count: int, batch_size: int, folder: Path
) -> Batches:
    """Batches of features that are encoded once: float16, in an unnamed temporary file.

    Args:
        sample: reads an image; gets no generator.
        encode: the encoder, on this process's device.
        count: images.
        batch_size: images encoded at once.
        folder: for the file, with room for the features and targets of all images, on each rank.

    Raises:
        TeacherError: a feature is too large for float16.
    """
    files: list[np.memmap] = []
    for start in tracked(range(0, count, batch_size), "features"):
        chosen = range(start, min(start + batch_size, count))
        maps, target = _encode_shares([partial(sample, n, None) for n in chosen], encode)
        halves = [each.half() for each in maps]
        if not all(half.isfinite().all() for half in halves):
            raise TeacherError(
                "mode: cached stores features as float16, which those of this encoder exceed; "
                "choose online"
            )
        rows = [each.cpu().numpy() for each in (*halves, target)]
        files = files or [_file_of_rows(row, count, folder) for row in rows]
        for file, row in zip(files, rows, strict=True):
            file[chosen.start : chosen.stop] = row

    def batch(numbers: Sequence[int], step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        device = distributed.device()
        rows = [torch.from_numpy(file[list(numbers)]).to(device) for file in files]
        return tuple(each.float() for each in rows[:-1]), rows[-1]

    return batch


def probe_batches(
    config: ProbeConfig, sample: ReadView, encode: EncodeImages, count: int, seed: int, folder: Path
) -> Batches:
    """Batches by `config.mode`, see `online_batches` and `cached_batches`."""
    if config.mode == "online":
        return online_batches(sample, encode, seed)
    return cached_batches(sample, encode, count, config.batch_size, folder)


def train_heads(
    build_head: Callable[[], Head],
    config: ProbeConfig,
    batches: Batches,
    loss: Loss,
    count: int,
    seed: int,
) -> list[Head]:
    """Trains a head for each learning rate.

    A head depends on its own rate, the seed and the images, and not on the other rates or on the
    state of torch's default generators, which is restored.

    Args:
        build_head: builds a head, which takes the maps of a batch, `head(*maps)`.
        config: rates and schedule.
        batches: of maps and targets.
        loss: of one head's prediction.
        count: images.
        seed: of the initial weights, the order of the images and the dropout.

    Returns:
        The heads in the order of `config.lr`, in eval mode, without gradients.

    Raises:
        RecipeError: a learning rate is too high: its loss is not finite.
    """
    device = distributed.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        heads = []
        for _ in config.lr:
            torch.manual_seed(distributed.derive_seed(seed, "head"))
            heads.append(build_head().to(device).train())
        groups = [
            {"params": list(head.parameters()), "peak": peak, "lr": peak}
            for head, peak in zip(heads, config.lr, strict=True)
        ]
        optimizer = _optimizer(groups, config)
        order = image_order(count, config.steps * config.batch_size, seed)
        for step in tracked(range(config.steps), "probe"):
            start = step * config.batch_size
            numbers = order[start : start + config.batch_size].tolist()
            maps, target = batches(numbers, step)
            for head, group in zip(heads, optimizer.param_groups, strict=True):
                torch.manual_seed(distributed.derive_seed(seed, "step", step))
                _backward(loss(head(*maps), target, step), group, config.clip)
                group["lr"] = group["peak"] * config.rate_ratio(step)
            optimizer.step()
            optimizer.zero_grad()
    return [head.eval().requires_grad_(False) for head in heads]


def image_order(count: int, length: int, seed: int) -> Tensor:
    """The numbers of the training images in order: all of them, shuffled anew in each epoch.

    Args:
        count: images.
        length: of the result.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(distributed.derive_seed(seed, "order"))
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
    return torch.cat(rounds)[:length]


def _optimizer(groups: list[dict[str, Any]], config: ProbeConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _backward(loss: Tensor, group: dict[str, Any], clip: float | None) -> None:
    if not loss.isfinite():
        raise RecipeError(f"lr: {group['peak']:g} is too high: the loss is {loss.item()}")
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(group["params"], clip)


def _encode_shares(
    reads: Sequence[Callable[[], tuple[Tensor, Tensor]]], encode: EncodeImages
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The maps and targets of a batch, of which each rank reads and encodes its own share."""
    own = own_share(len(reads))
    # A rank without a share encodes an image too: it needs the shapes.
    images, targets = zip(*(reads[k]() for k in own or [0]), strict=True)
    device = distributed.device()
    maps, target = encode(torch.stack(images).to(device)), torch.stack(targets).to(device)
    shares = [each[: len(own)].contiguous() for each in (*maps, target)]
    *gathered, target = [gather_shares(share, len(reads)) for share in shares]
    return tuple(gathered), target


def _file_of_rows(like: np.ndarray, count: int, folder: Path) -> np.memmap:
    """An array of `count` rows of the shape and dtype of those of `like`, in an unnamed file."""
    size = count * like[:1].nbytes
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a sparse file could crash later
        except OSError as error:
            raise RecipeError(
                f"mode: cached needs {size / 1e9:.1f} GB in {folder} ({error.strerror}); "
                "choose online, or another dir"
            ) from None
        return np.memmap(file, dtype=like.dtype, mode="r+", shape=(count, *like.shape[1:]))
