"""Bytes by hand, rings step by step, and what DeepSpeed's ranks really exchange."""

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.engine_config import EngineConfig
from distill.engine.optimizer import OptimizerConfig, decay_groups
from distill.planning.memory import Sharding
from distill.planning.meter import Trace
from tests.ranks import run_on_ranks

TRACE = Trace(images=2, components={}, peak=1000, peak_with_gradients=1300)


def sharding(**options: Any) -> Sharding:
    return Sharding(EngineConfig(**options), parameters=100, largest=10)


def test_one_process_holds_weights_moments_average_and_gradients_once() -> None:
    memory = sharding(zero_stage=2, ema_decay=0.9).memory(TRACE, 1, accumulation=1, teachers=7)
    assert memory.weights + memory.masters == 4 * 100
    assert (memory.moments, memory.average, memory.buckets) == (8 * 100, 4 * 100, 4 * 10)
    assert memory.gradients + memory.activations == 1300
    assert memory.total == 16 * 100 + 40 + 7 + 1300


def test_gradients_of_earlier_micro_batches_add_to_a_later_ones_activations() -> None:
    memory = sharding(zero_stage=1).memory(TRACE, 1, accumulation=2, teachers=0)
    assert memory.gradients + memory.activations == 1000 + 4 * 100


def test_an_update_is_the_fullest_moment_where_images_are_few() -> None:
    few = Trace(images=1, components={}, peak=5, peak_with_gradients=6)
    memory = sharding(zero_stage=1).memory(few, 1, accumulation=1, teachers=0)
    assert memory.gradients + memory.activations == 4 * 100 + 4 * 10


@pytest.mark.parametrize(
    ("stage", "gradients"), [(1, 400.0), (2, 100.0), (3, 100.0)], ids=["1", "2", "3"]
)
def test_ranks_share_masters_moments_average_and_from_stage_2_gradients(
    stage: int, gradients: float
) -> None:
    options = {"zero_stage": stage, "ema_decay": 0.9}
    memory = sharding(**options).memory(TRACE, 4, accumulation=2, teachers=0)
    assert (memory.masters, memory.moments, memory.average) == (100, 200, 100)
    assert memory.gradients == gradients


def test_fp16_keeps_half_of_the_weights_beside_float32_masters() -> None:
    memory = sharding(precision="fp16").memory(TRACE, 1, accumulation=1, teachers=0)
    assert (memory.weights, memory.masters) == (200, 400)


def test_frozen_weights_lie_on_every_rank_and_in_a_whole_average() -> None:
    config = EngineConfig(zero_stage=2, ema_decay=0.9)
    tuned = Sharding(config, parameters=100, largest=10, fixed=600)
    memory = tuned.memory(TRACE, 4, accumulation=1, teachers=0)
    assert (memory.weights, memory.moments, memory.average) == (600 + 400, 200, 100)
    assert tuned.collectives(1) == sharding(zero_stage=2).collectives(1)
    whole = replace(tuned, whole_average=True).memory(TRACE, 4, accumulation=1, teachers=0)
    assert whole.average == 600 + 400


def test_what_a_rank_sends_is_what_rings_send_chunk_by_chunk() -> None:
    """A ring all-reduce is a scatter and a gather, each of ranks - 1 turns of one chunk."""
    ranks, whole = 8, 400
    chunk = whole / ranks
    reduce = sum(chunk for _ in range(ranks - 1)) + sum(chunk for _ in range(ranks - 1))
    gather = sum(chunk for _ in range(ranks - 1))
    assert sharding(zero_stage=1).sent(ranks, 3) == pytest.approx(reduce + gather)
    assert sharding(zero_stage=2).sent(ranks, 3) == pytest.approx(3 * reduce + gather)
    assert sharding(zero_stage=3).sent(ranks, 3) == pytest.approx(3 * 3 * gather)
    assert sharding(zero_stage=1).sent(1, 3) == 0


def exchange(stage: int, accumulation: int) -> dict[str, int]:
    """Elements of the collectives of a step on this rank."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
            counts[name] += tensors[0].numel() * tensors[0].element_size()
            return original(*arguments, **options)

        return patch.object(dist, name, call)

    with counting("all_reduce"), counting("all_gather_into_tensor"):
        module = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
        optimizer = OptimizerConfig()
        groups = decay_groups(module, optimizer, set())
        config = EngineConfig(zero_stage=stage)
        engine = DeepSpeedEngine(module, config, optimizer, groups, micro_batch_size=2)
        for _ in range(2):
            counts.clear()
            for _ in range(accumulation):
                engine.backward(engine(torch.rand(2, 128)).square().mean())
            engine.step(1e-3)
    return dict(counts)


@pytest.mark.process
@pytest.mark.parametrize(("stage", "accumulation"), [(1, 2), (2, 1), (2, 2)])
def test_two_ranks_exchange_what_is_predicted(stage: int, accumulation: int) -> None:
    parameters = 2 * (128 * 128 + 128)
    config = EngineConfig(zero_stage=stage)
    due = Sharding(config, parameters, largest=1 << 22).collectives(accumulation)
    for came in run_on_ranks(2, exchange, stage, accumulation):
        # Norms and flags are a few numbers more, and slices are padded.
        assert came["all_reduce"] == pytest.approx(due.reduced, rel=0.02)
        assert came["all_gather_into_tensor"] == pytest.approx(due.moved, rel=0.02)
