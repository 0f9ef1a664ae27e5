"""Batch norms under the engine: alike on all ranks, averaged, resumed to the bit, not in a skip."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.engine.batch_norms import BatchNorms
from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.engine_config import EngineConfig
from distill.engine.optimizer import decay_groups
from distill.runtime import distributed
from tests.ranks import run_on_ranks
from tests.test_engine_engine import LR, OPTIMIZER

STEPS, DECAY = 4, 0.9
STATISTICS = ("1.running_mean", "1.running_var")


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (1 + rank) * torch.randn(6, 4, generator=generator) + rank


def build(stage: int, *, whole: bool = False) -> DeepSpeedEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    config = EngineConfig(zero_stage=stage, ema_decay=DECAY)
    groups = decay_groups(module, OPTIMIZER, set())
    return DeepSpeedEngine(
        module, config, OPTIMIZER, groups, micro_batch_size=6, whole_average=whole
    )


def one_step(engine: DeepSpeedEngine, step: int, scale: float = 1.0) -> None:
    engine.backward(engine(scale * batch(step, distributed.rank())).square().mean())
    engine.step(LR)


def weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    average = {f"average.{name}": value for name, value in engine.weights().items()}
    return engine.weights(average=False) | average


def straight_and_resumed(folder: str) -> list[Any]:
    """For each stage, the weights after each step of a run, and of one resumed after the second."""
    found = []
    for stage, whole in ((1, False), (2, True), (3, False)):
        engine, steps = build(stage, whole=whole), []
        place = Path(folder) / f"{stage}"
        for step in range(STEPS):
            one_step(engine, step)
            steps.append(weights(engine))
            if step == 1:
                place.mkdir(parents=True, exist_ok=True)
                distributed.barrier()
                engine.save(place)
                distributed.barrier()
        engine.close()
        again = build(stage, whole=whole)
        again.load(place, ranks=distributed.world_size())
        for step in range(2, STEPS):
            one_step(again, step)
        found.append((steps, weights(again)))
        again.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By the number of ranks, what each rank found."""
    return {
        ranks: run_on_ranks(
            ranks, straight_and_resumed, str(tmp_path_factory.mktemp("saved") / str(ranks))
        )
        for ranks in (1, 2)
    }


@pytest.mark.process
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 2], ids=["zero 1", "zero 2, whole", "zero 3"])
def test_a_resumed_run_has_the_same_statistics_to_the_bit(
    runs: dict[int, list[Any]], ranks: int, number: int
) -> None:
    steps, resumed = runs[ranks][0][number]
    assert steps[-1].keys() == resumed.keys()
    for name, value in steps[-1].items():
        assert torch.equal(value, resumed[name]), name
    assert resumed["1.num_batches_tracked"].dtype == torch.int64
    assert resumed["average.1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.process
@pytest.mark.parametrize("number", [0, 1, 2], ids=["zero 1", "zero 2, whole", "zero 3"])
def test_the_ranks_share_the_statistics_of_their_mixture(
    runs: dict[int, list[Any]], number: int
) -> None:
    for one, other in zip(runs[2][0][number][0], runs[2][1][number][0], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in STATISTICS)
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    means, variances = [], []
    for rank in range(2):
        norm = nn.BatchNorm1d(3).train()
        norm(linear(batch(0, rank)))
        means.append(norm.running_mean)
        variances.append(norm.running_var)
    mean = torch.stack(means).mean(0)
    second = (torch.stack(variances) + torch.stack(means) ** 2).mean(0)
    first = runs[2][0][number][0][0]
    torch.testing.assert_close(first["1.running_mean"], mean)
    torch.testing.assert_close(first["1.running_var"], second - mean**2)


@pytest.mark.process
@pytest.mark.parametrize("number", [0, 1, 2], ids=["zero 1", "zero 2, whole", "zero 3"])
def test_the_average_follows_the_statistics(runs: dict[int, list[Any]], number: int) -> None:
    steps, _ = runs[1][0][number]
    for name, start in zip(STATISTICS, (0.0, 1.0), strict=True):
        due = torch.full((3,), start)
        for step, found in enumerate(steps, start=1):
            decay = min(DECAY, (1 + step) / (10 + step))
            due = decay * due + (1 - decay) * found[name]
            torch.testing.assert_close(found[f"average.{name}"], due)


def test_a_step_that_is_skipped_leaves_no_trace() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    norms = BatchNorms(module, DECAY)
    module(torch.randn(4, 3))
    norms.follow(1, skipped=False)
    before = {name: value.clone() for name, value in module.named_buffers()}
    average = {name: value.clone() for name, value in norms.averaged().items()}
    module(torch.full((4, 3), math.nan))
    assert not module[0].running_mean.isfinite().any()
    norms.follow(2, skipped=True)
    for name in ("0.running_mean", "0.running_var"):
        assert torch.equal(module.get_buffer(name), before[name])
        assert torch.equal(norms.averaged()[name], average[name])


def test_a_module_without_batch_norms_has_no_average_of_them() -> None:
    norms = BatchNorms(nn.Linear(2, 2), DECAY)
    norms.follow(1, skipped=False)
    assert norms.averaged() == {}
