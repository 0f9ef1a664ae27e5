"""Trains probes, small heads on the maps of a frozen encoder, as dense benchmarks need it.

On-line, each step encodes images that were augmented for it; cached, every image is encoded once,
without augmentation, and steps read what was kept: a quick sweep, and another protocol. Several
learning rates train in one pass, a head for each. Encoding is shared by the ranks; every rank then
trains the same heads on the whole batch, statistics of their batch norms included.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

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
# An image (3, H, W) in [0, 1] and its target, both of one size for all images; augmented with the
# generator, or not at all without one.
Sample = Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]
Encode = Callable[[Tensor], tuple[Tensor, ...]]  # images (B, 3, H, W) to maps (B, D, h, w)
Loss = Callable[[Tensor, Tensor, int], Tensor]  # prediction, target, 0-based step


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class ProbeConfig(StrictConfig):
    """How a probe is trained.

    Attributes:
        steps: of the optimiser.
        batch_size: images of a step, those of all ranks together.
        optimizer: `adamw`, or `sgd` with momentum 0.9.
        lr: peak learning rate, or several; the best on the test images counts, as is published.
        weight_decay: of all parameters.
        warmup_steps: of linear rise, fewer than `steps`.
        schedule: how the rate falls from then on, every step, to almost zero at the last one.
        clip: largest norm of a head's gradient; None for any.
        mode: `online`, or `cached` for features without augmentation, encoded once.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_listed), Field(min_length=1)]
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["linear", "cosine"] = "linear"
    clip: PositiveFloat | None = None
    mode: Literal["online", "cached"] = "online"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} of {self.steps} steps leave none to learn in"
            )
        if len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr: {list(self.lr)} has one twice")
        return self

    def rate_ratio(self, step: int) -> float:
        """The learning rate of a 0-based step as a share of its peak."""
        falling = ScheduleConfig(kind=self.schedule, warmup_steps=self.warmup_steps)
        return scheduled_ratio(falling, step, self.steps)


class Batches(Protocol):
    """What heads are trained on."""

    def batch(self, numbers: Sequence[int], step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The inputs of the heads and the targets of a step, the same on every rank.

        Args:
            numbers: of the B images.
            step: the 0-based one.
        """
        ...


class OnlineFeatures:
    """Batches that are augmented and encoded when they are asked for.

    Args:
        sample: reads an image.
        encode: the encoder, on this process's device.
        seed: of the augmentation, which depends on nothing else but the place in the training.
    """

    def __init__(self, sample: Sample, encode: Encode, seed: int) -> None:
        self._sample, self._encode, self._seed = sample, encode, seed

    def batch(self, numbers: Sequence[int], step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The maps and targets of a step.

        Args:
            numbers: of the B images.
            step: the 0-based one.

        Returns:
            The maps, each (B, D, h, w), and the targets (B, ...), on every rank.
        """
        reads = []
        for place, number in enumerate(numbers):
            seed = distributed.derive_seed(self._seed, "augmentation", step, place)
            reads.append(partial(self._sample, number, torch.Generator().manual_seed(seed)))
        return _encode_shares(reads, self._encode)


class CachedFeatures:
    """Features of all images, encoded once: float16, in a file that goes when this does.

    Args:
        sample: reads an image; is given no generator.
        encode: the encoder, on this process's device.
        count: images.
        batch_size: images encoded at once.
        folder: for the file, where there is room for all features and targets of every rank.

    Raises:
        TeacherError: a feature is too large for float16.
    """

    def __init__(
        self, sample: Sample, encode: Encode, count: int, batch_size: int, folder: Path
    ) -> None:
        self._rows: list[np.memmap] = []
        self._device = distributed.device()
        starts = range(0, count, batch_size)
        for start in tracked(starts, "features"):
            numbers = range(start, min(start + batch_size, count))
            maps, target = _encode_shares([partial(sample, n, None) for n in numbers], encode)
            halves = [each.half() for each in maps]
            if not all(half.isfinite().all() for half in halves):
                raise TeacherError(
                    "mode: cached keeps features as float16, and this encoder has larger ones; "
                    "choose online"
                )
            rows = [each.cpu().numpy() for each in (*halves, target)]
            if not self._rows:
                self._rows = [_file_of_rows(row, count, folder) for row in rows]
            for kept, row in zip(self._rows, rows, strict=True):
                kept[numbers.start : numbers.stop] = row

    def batch(self, numbers: Sequence[int], step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The maps and targets of a step, as those of `OnlineFeatures`."""
        rows = [torch.from_numpy(kept[list(numbers)]).to(self._device) for kept in self._rows]
        return tuple(each.float() for each in rows[:-1]), rows[-1]


def probe_features(
    config: ProbeConfig, sample: Sample, encode: Encode, count: int, seed: int, folder: Path
) -> OnlineFeatures | CachedFeatures:
    """What `config.mode` asks for."""
    if config.mode == "online":
        return OnlineFeatures(sample, encode, seed)
    return CachedFeatures(sample, encode, count, config.batch_size, folder)


def train_heads(
    build_head: Callable[[], Head],
    config: ProbeConfig,
    features: Batches,
    loss: Loss,
    count: int,
    seed: int,
) -> list[Head]:
    """Trains a head for each learning rate.

    A head depends on its own rate, the seed and the images; not on the other rates, nor on what
    torch's default generators did before, which are left as they were.

    Args:
        build_head: makes one that takes the maps of a batch, `head(*maps)`.
        config: rates and schedule.
        features: gives the batches.
        loss: of one head's prediction.
        count: images.
        seed: of the initial weights, the order of the images and whatever is random in a head.

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
            maps, target = features.batch(numbers, step)
            for head, group in zip(heads, optimizer.param_groups, strict=True):
                torch.manual_seed(distributed.derive_seed(seed, "step", step))
                _backward(loss(head(*maps), target, step), group, config.clip)
                group["lr"] = group["peak"] * config.rate_ratio(step)
            optimizer.step()
            optimizer.zero_grad()
    return [head.eval().requires_grad_(False) for head in heads]


def image_order(count: int, length: int, seed: int) -> Tensor:
    """The images in the order of training: all of them, shuffled, again and again.

    Args:
        count: images.
        length: of the order.
        seed: fixes it.
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
    reads: Sequence[Callable[[], tuple[Tensor, Tensor]]], encode: Encode
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The maps and targets of a batch, of which each rank reads and encodes its own share."""
    own = own_share(len(reads))
    # A rank without a share encodes an image all the same: it has to know the shapes.
    images, targets = zip(*(reads[k]() for k in own or [0]), strict=True)
    device = distributed.device()
    maps, target = encode(torch.stack(images).to(device)), torch.stack(targets).to(device)
    shares = [each[: len(own)].contiguous() for each in (*maps, target)]
    *gathered, target = [gather_shares(share, len(reads)) for share in shares]
    return tuple(gathered), target


def _file_of_rows(like: np.ndarray, count: int, folder: Path) -> np.memmap:
    """Room for `count` rows of the kind of those given, in a file without a name."""
    size = count * like[:1].nbytes
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a file with holes would fail later, hard
        except OSError as error:
            raise RecipeError(
                f"mode: cached needs {size / 1e9:.1f} GB in {folder} ({error.strerror}); "
                "choose online, or another dir"
            ) from None
        return np.memmap(file, dtype=like.dtype, mode="r+", shape=(count, *like.shape[1:]))
