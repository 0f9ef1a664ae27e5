"""The average as a module: its decay, its mode, and the engine's with it."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.ema import AveragedModule
from distill.engine.engine_config import EngineConfig, why_no_whole_average
from distill.engine.optimizer import decay_groups
from distill.runtime import distributed
from tests.ranks import run_on_ranks
from tests.test_engine_engine import DECAY, LR, OPTIMIZER, TwoHeads, _batch, _loss, train_plainly

STEPS, MICRO = 3, 2


def test_the_distance_to_constant_weights_decays_as_the_power_of_the_steps() -> None:
    start, constant = nn.Linear(3, 2), nn.Linear(3, 2)
    average = AveragedModule(start, 0.8)
    for _ in range(5):
        average.follow(constant)
    for name, value in average.weights().items():
        first, last = start.state_dict()[name], constant.state_dict()[name]
        torch.testing.assert_close(value - last, 0.8**5 * (first - last))


def test_it_is_frozen_in_evaluation_mode_and_takes_buffers_over() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    average = AveragedModule(module, 0.8)
    module(torch.randn(4, 3))
    average.follow(module)
    assert module.training
    assert not any(m.training for m in average.module.modules())
    assert not any(p.requires_grad for p in average.module.parameters())
    assert torch.equal(average.module[0].running_mean, module[0].running_mean)


def train(stage: int, folder: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """As `train_with_engine`, with a whole average: its weights, and what it makes of a batch."""
    config = EngineConfig(zero_stage=stage, gradient_clipping=0.2, ema_decay=DECAY)

    def build() -> DeepSpeedEngine:
        module = TwoHeads()
        first, second = decay_groups(module, OPTIMIZER, {"token"})
        groups = [first, second._replace(lr_scale=0.5)]
        return DeepSpeedEngine(
            module, config, OPTIMIZER, groups, micro_batch_size=4, whole_average=True
        )

    engine, rank = build(), distributed.rank()
    for step in range(STEPS):
        assert engine.steps == step
        for micro in range(MICRO):
            outputs = engine(_batch(step, rank, micro))
            engine.backward(_loss(outputs, step, rank) / MICRO)
        engine.step(LR * (step + 1))
        if folder and step == 0:
            distributed.on_all_ranks(lambda: Path(folder).mkdir(exist_ok=True))
            engine.save(Path(folder))
            distributed.barrier()
            engine.close()
            engine = build()
            engine.load(Path(folder), ranks=distributed.world_size())
    now, average = engine.weights(average=False), engine.weights()
    seen = engine.averaged(_batch(9, 0, 0))[0]
    engine.close()
    return {**now, **{f"average.{name}": value for name, value in average.items()}}, seen


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_rank_has_all_of_the_average_and_keeps_it_over_a_checkpoint(
    stage: int, num_ranks: int, tmp_path: Path
) -> None:
    expected = train_plainly(num_ranks, 0.2, "adamw")
    straight = run_on_ranks(num_ranks, train, stage, None)
    resumed = run_on_ranks(num_ranks, train, stage, str(tmp_path / "saved"))
    plain = TwoHeads()
    plain.load_state_dict(
        {n.removeprefix("average."): v for n, v in straight[0][0].items() if "average." in n}
    )
    for (weights, seen), (again, seen_again) in zip(straight, resumed, strict=True):
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value.double(), expected[name], atol=3e-6, rtol=1e-5)
            assert torch.equal(value, again[name])
        assert torch.equal(seen, seen_again)
        torch.testing.assert_close(seen, plain(_batch(9, 0, 0))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "engine.ema_decay: is 0"),
        ({"ema_decay": 0.9, "zero_stage": 3}, "engine.zero_stage: 3 leaves no rank .*use 1 or 2"),
        ({"ema_decay": 0.9, "precision": "fp16"}, "engine.precision: .*use bf16 or fp32"),
    ],
)
def test_what_cannot_run_is_told_with_the_key(options: dict[str, object], message: str) -> None:
    problem = why_no_whole_average(EngineConfig.model_validate(options))
    assert re.match(message, str(problem))


def test_a_whole_average_needs_nothing_more() -> None:
    assert why_no_whole_average(EngineConfig(ema_decay=0.9, precision="bf16")) is None
