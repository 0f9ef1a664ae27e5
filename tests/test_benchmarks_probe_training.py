"""Probes: what is trained and what never is, from one seed, on any number of ranks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill.benchmarks.dense import probe_training
from distill.benchmarks.dense.probe_training import (
    ProbeConfig,
    cached_batches,
    image_order,
    online_batches,
    train_heads,
)
from distill.runtime.errors import RecipeError
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
from tests.ranks import run_on_ranks

COUNT = 6


class Normed(Teacher):
    """An encoder with batch norms, whose statistics a wrong mode would move."""

    def __init__(self) -> None:
        spec = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=4, resolution=(8, 8))
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4))

    def extract(self, images: Tensor) -> Features:
        return Features(None, self.net(images))


def config(**changes: Any) -> ProbeConfig:
    return ProbeConfig(**({"steps": 20, "batch_size": 3, "lr": 0.01} | changes))


def sample(number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Bright images have high targets; augmentation adds noise to the pixels."""
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(number)) * number / COUNT
    target = image.mean(0, keepdim=True)
    if generator is not None:
        image = (image + torch.rand(image.shape, generator=generator) * 0.1).clamp(0, 1)
    return image, target


def encode(images: Tensor) -> tuple[Tensor, ...]:
    return (Normed()(images).spatial,)


def head() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.Dropout2d(0.2), nn.Conv2d(4, 1, 1))


def loss(prediction: Tensor, target: Tensor, step: int) -> Tensor:
    grid = (prediction.shape[-2], prediction.shape[-1])
    return (prediction - nn.functional.adaptive_avg_pool2d(target, grid)).square().mean()


def trained(seed: int = 0, **changes: Any) -> list[dict[str, Tensor]]:
    batches = online_batches(sample, encode, seed)
    heads = train_heads(head, config(**changes), batches, loss, COUNT, seed)
    return [each.state_dict() for each in heads]


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return all(torch.allclose(a[n].double(), b[n].double(), rtol=0, atol=tolerance) for n in a)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_rises_once_then_falls_every_step_to_almost_zero(schedule: str) -> None:
    chosen = config(steps=200, warmup_steps=20, schedule=schedule)
    ratios = [chosen.rate_ratio(step) for step in range(200)]
    assert all(a < b for a, b in pairwise(ratios[:21]))
    assert ratios[20] == 1
    assert all(a > b for a, b in pairwise(ratios[20:]))
    assert 0 < ratios[-1] < 0.01


def test_the_optimiser_follows_the_schedule_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def watched(self: Any) -> None:
        rates.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    trained(lr=(0.1, 0.02), steps=4, warmup_steps=1)
    due = torch.tensor([0.5, 1, 2 / 3, 1 / 3])
    assert torch.allclose(torch.tensor(rates), due[:, None] * torch.tensor([0.1, 0.02]))


def test_the_head_trains_with_its_batch_norm_and_the_encoder_never() -> None:
    encoder = Normed()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    batches = online_batches(sample, lambda images: (encoder(images).spatial,), 0)
    (mine,) = train_heads(head, config(), batches, loss, COUNT, 0)
    assert same(encoder.state_dict(), before)
    assert not mine.training
    assert mine.state_dict()["0.num_batches_tracked"] == 20
    assert not torch.equal(mine.state_dict()["0.running_mean"], torch.zeros(4))


@pytest.mark.long
def test_a_trained_probe_tells_what_it_was_trained_for() -> None:
    """The target is a linear function of the batches, so the best probe makes no error."""

    def ramp(number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        image, _ = sample(number + 1, None)
        return image, image[:1]

    def identity(images: Tensor) -> tuple[Tensor, ...]:
        return (images,)

    chosen = config(steps=500, batch_size=6, lr=0.03)
    batches = online_batches(ramp, identity, 0)
    (mine,) = train_heads(lambda: nn.Conv2d(3, 1, 1), chosen, batches, loss, 4, 0)
    maps, target = batches(range(4), 0)
    assert loss(mine(*maps), target, 0) < 1e-6


def test_one_seed_gives_one_head_and_leaves_the_default_generator_alone() -> None:
    torch.manual_seed(5)
    first = trained()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert same(first[0], trained()[0])
    assert not same(first[0], trained(seed=1)[0])


def test_a_rate_gives_the_same_head_alone_and_among_others() -> None:
    many = trained(lr=(0.1, 0.01, 0.001))
    assert same(many[1], trained(lr=0.01)[0])
    assert not same(many[0], many[1])


@pytest.mark.process
def test_any_number_of_ranks_trains_the_same_heads() -> None:
    """Batches of three on two ranks, and of one: uneven shares, and a rank without any."""
    for size in (3, 1):
        (alone,) = trained(batch_size=size)
        ranks = run_on_ranks(2, trained_on_rank, size)
        assert same(ranks[0], ranks[1])
        assert same(ranks[0], alone, tolerance=1e-5)


def trained_on_rank(size: int) -> dict[str, Tensor]:
    return trained(batch_size=size)[0]


def test_augmentation_differs_by_step_and_place_and_is_the_same_again() -> None:
    batches = online_batches(sample, lambda images: (images,), 0)
    (first,), _ = batches([2, 2], 0)
    (again,), _ = batches([2, 2], 0)
    (later,), _ = batches([2, 2], 1)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, later)


def test_cached_features_are_those_of_the_images_as_they_are(tmp_path: Path) -> None:
    calls = []

    def counted(images: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(images))
        return encode(images)

    batches = cached_batches(sample, counted, COUNT, 4, tmp_path)
    assert calls == [4, 2]
    (maps,), target = batches([5, 0, 5], 7)
    images, targets = zip(*(sample(number, None) for number in (5, 0, 5)), strict=True)
    assert torch.allclose(maps, encode(torch.stack(images))[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(target, torch.stack(targets))
    assert calls == [4, 2]
    assert list(tmp_path.iterdir()) == []


def test_features_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="mode: cached stores features as float16.*online"):
        cached_batches(sample, lambda images: (images * 1e6,), COUNT, 4, tmp_path)


def test_a_full_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe_training.os, "posix_fallocate", full)
    with pytest.raises(RecipeError, match=r"needs 0.0 GB in .*No space left.*choose online"):
        cached_batches(sample, encode, COUNT, 4, tmp_path)


def test_the_order_takes_every_image_before_one_comes_again() -> None:
    order = image_order(5, 12, 0).tolist()
    assert len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert order != image_order(5, 12, 1).tolist()


def test_a_rate_that_diverges_is_named() -> None:
    with pytest.raises(RecipeError, match=r"lr: 1e\+30 is too high: the loss is (inf|nan)"):
        trained(lr=(0.1, 1e30))


def test_a_gradient_is_clipped_for_each_head_on_its_own() -> None:
    free, clipped = trained(steps=1, lr=0.1), trained(steps=1, lr=0.1, clip=1e-12)
    # Adam's first step has the length of the rate, unless the gradient is as small as its eps.
    start = trained(steps=1, lr=1e-30)
    move = (clipped[0]["2.weight"] - start[0]["2.weight"]).abs().max()
    assert move < 1e-4 < (free[0]["2.weight"] - start[0]["2.weight"]).abs().max()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warmup_steps": 20}, r"warmup_steps: expected fewer than steps \(20\), got 20"),
        ({"lr": (0.1, 0.1)}, r"lr: expected different rates, got \[0.1, 0.1\]"),
        ({"schedule": "poly"}, "linear"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)
