"""The engine against plain PyTorch: gradients, clipping, averaging, precision, resuming."""

import itertools
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.engine_config import EngineConfig, deepspeed_config
from distill.engine.optimizer import OptimizerConfig, ParameterGroup, build_optimizer, decay_groups
from distill.runtime import distributed
from tests.ranks import run_on_ranks

OPTIMIZER = OptimizerConfig(weight_decay=0.1)
STEPS, MICRO, LR, DECAY = 3, 2, 1e-2, 0.9


class TwoHeads(nn.Module):
    """A token, a trunk, and two heads, of which one is silent in odd steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 8) * 0.1)
        self.trunk = nn.Linear(4, 8)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x) + self.token)
        return self.left(hidden), self.right(hidden)


def _groups(module: nn.Module, optimizer: OptimizerConfig) -> list[ParameterGroup]:
    """The second group learns at half the rate."""
    first, second = decay_groups(module, optimizer, {"token"})
    return [first, second._replace(lr_scale=0.5)]


def _batch(step: int, rank: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randn(4, 4, generator=generator)


def _loss(outputs: tuple[Tensor, Tensor], step: int, rank: int) -> Tensor:
    """The right head speaks on even steps, and then on rank 0 only."""
    left, right = outputs
    speaks = float(step % 2 == 0 and rank == 0)
    return left.square().mean() + speaks * 3 * (right - 1).square().mean()


def train_in_parts(*arguments: Any) -> dict[str, Tensor]:
    """Trains with flat tensors of one or two parameters each."""
    with patch("distill.engine.optimizer.FLAT_SIZE", 33):
        return train_with_engine(*arguments)


def train_with_engine(
    stage: int, clip: float, folder: str | None, kind: Literal["adamw", "nadam"] = "adamw"
) -> dict[str, Tensor]:
    """Trains; with a folder it saves after the first step and goes on in a new engine."""
    optimizer = OPTIMIZER.model_copy(update={"kind": kind})
    config = EngineConfig(zero_stage=stage, gradient_clipping=clip, ema_decay=DECAY)

    def build() -> DeepSpeedEngine:
        module = TwoHeads()
        groups = _groups(module, optimizer)
        return DeepSpeedEngine(module, config, optimizer, groups, micro_batch_size=4)

    engine, rank = build(), distributed.rank()
    for step in range(STEPS):
        for micro in range(MICRO):
            outputs = engine(_batch(step, rank, micro))
            engine.backward(_loss(outputs, step, rank) / MICRO)
        engine.step(LR * (step + 1))
        if folder and step == 0:
            Path(folder).mkdir(exist_ok=True)
            distributed.barrier()
            engine.save(Path(folder))
            distributed.barrier()
            engine.close()
            engine = build()
            engine.load(Path(folder), ranks=distributed.world_size())
    now, average = engine.weights(average=False), engine.weights()
    engine.close()
    return {**now, **{f"average.{name}": value for name, value in average.items()}}


def train_plainly(world: int, clip: float, kind: str) -> dict[str, Tensor]:
    """The same in float64, one process, no accumulation."""
    module = TwoHeads().double()
    scales = (1.0, 0.5)
    groups = [
        {"params": group.parameters, "weight_decay": group.weight_decay}
        for group in _groups(module, OPTIMIZER)
    ]
    found = {"adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}[kind]
    plain = found(groups, lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    average = {n: p.detach().clone() for n, p in module.named_parameters()}
    for step in range(STEPS):
        losses = [
            _loss(module(_batch(step, rank, micro).double()), step, rank)
            for rank in range(world)
            for micro in range(MICRO)
        ]
        plain.zero_grad()
        (sum(losses) / len(losses)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip if clip else float("inf"))
        for group, scale in zip(plain.param_groups, scales, strict=True):
            group["lr"] = LR * (step + 1) * scale
        plain.step()
        for name, parameter in module.named_parameters():
            average[name] = DECAY * average[name] + (1 - DECAY) * parameter.detach()
    now = {n: p.detach() for n, p in module.named_parameters()}
    return {**now, **{f"average.{name}": value for name, value in average.items()}}


@pytest.mark.process
@pytest.mark.parametrize(("clip", "kind"), [(0.0, "adamw"), (0.2, "adamw"), (0.2, "nadam")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_accumulating_equal_one_plain_float64_process(
    stage: int, clip: float, kind: str
) -> None:
    expected = train_plainly(2, clip, kind)
    for weights in run_on_ranks(2, train_with_engine, stage, clip, None, kind):
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value.double(), expected[name], atol=3e-6, rtol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_large_groups_trained_in_parts_equal_one_plain_float64_process(
    stage: int, num_ranks: int, tmp_path: Path
) -> None:
    expected = train_plainly(num_ranks, 0.2, "adamw")
    for folder in (None, str(tmp_path / "saved")):
        for weights in run_on_ranks(num_ranks, train_in_parts, stage, 0.2, folder):
            for name, value in weights.items():
                torch.testing.assert_close(value.double(), expected[name], atol=3e-6, rtol=1e-5)


def test_a_group_is_cut_between_parameters_where_it_grows_too_large() -> None:
    sizes = [20, 13, 1, 40, 5]
    group = ParameterGroup("all", [nn.Parameter(torch.zeros(n)) for n in sizes], 0.1)
    with patch("distill.engine.optimizer.FLAT_SIZE", 33):
        parts = build_optimizer(OPTIMIZER, [group]).param_groups
    assert [[p.numel() for p in part["params"]] for part in parts] == [[20, 13], [1], [40], [5]]
    assert {(part["name"], part["weight_decay"]) for part in parts} == {("all", 0.1)}


def _shares_weights(stage: int) -> bool:
    module = TwoHeads()
    engine = DeepSpeedEngine(
        module,
        EngineConfig(zero_stage=stage),
        OPTIMIZER,
        decay_groups(module, OPTIMIZER, set()),
        micro_batch_size=4,
    )
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return weights == {master.untyped_storage().data_ptr() for master in engine._slices()}


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_keeps_its_float32_weights_once(stage: int) -> None:
    assert run_on_ranks(1, _shares_weights, stage) == [True]


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "kind"), [(1, "adamw"), (2, "adamw"), (3, "adamw"), (2, "nadam")]
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_saving_and_loading_changes_no_bit(
    stage: int, kind: str, num_ranks: int, tmp_path: Path
) -> None:
    saved = str(tmp_path / "saved")
    straight = run_on_ranks(num_ranks, train_with_engine, stage, 0.2, None, kind)[0]
    resumed = run_on_ranks(num_ranks, train_with_engine, stage, 0.2, saved, kind)[0]
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


KINDS: list[tuple[int, Literal["adamw", "nadam"]]] = [
    (1, "adamw"),
    (2, "adamw"),
    (3, "adamw"),
    (2, "nadam"),
]


def write_all(folder: str) -> list[dict[str, Tensor]]:
    """Trains two steps, saves, and trains a third, under each stage."""
    return [_written(*kind, Path(folder) / f"{kind}") for kind in KINDS]


def _written(stage: int, kind: Literal["adamw", "nadam"], folder: Path) -> dict[str, Tensor]:
    engine = _part_of_a_run(stage, kind)
    for step in range(2):
        _one_step(engine, step)
    folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    engine.save(folder)
    distributed.barrier()
    return _third_step(engine)


def read_all(folder: str, written_by: int) -> list[dict[str, Tensor]]:
    """Loads what others saved, and trains the third step."""
    found = []
    for kind in KINDS:
        engine = _part_of_a_run(*kind)
        engine.load(Path(folder) / f"{kind}", ranks=written_by)
        found.append(_third_step(engine))
    return found


def _part_of_a_run(stage: int, kind: Literal["adamw", "nadam"]) -> DeepSpeedEngine:
    optimizer = OPTIMIZER.model_copy(update={"kind": kind})
    config = EngineConfig(zero_stage=stage, gradient_clipping=0.0, ema_decay=DECAY)
    module = TwoHeads()
    with patch(
        "distill.engine.optimizer.FLAT_SIZE", 33
    ):  # groups of several parameters, and of one
        groups = _groups(module, optimizer)
        return DeepSpeedEngine(module, config, optimizer, groups, micro_batch_size=4)


def _one_step(engine: DeepSpeedEngine, step: int) -> None:
    """The same gradient on every rank, so that their number changes no bit of it."""
    engine.backward(_loss(engine(_batch(step, 0, 0)), step, 0))
    engine.step(LR)


def _third_step(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    loaded = {**engine.weights(average=False)}
    loaded |= {f"average.{name}": value for name, value in engine.weights().items()}
    _one_step(engine, 2)
    loaded |= {f"third.{n}": value for n, value in engine.weights(average=False).items()}
    engine.close()
    return loaded


@pytest.mark.process
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_bits(
    before: int, after: int, tmp_path: Path
) -> None:
    """Weights, their average and, seen in the step that follows, the moments."""
    written = run_on_ranks(before, write_all, str(tmp_path))[0]
    for of_rank in run_on_ranks(after, read_all, str(tmp_path), before):
        for kind, due, read in zip(KINDS, written, of_rank, strict=True):
            assert read.keys() == due.keys()
            for name, value in due.items():
                # A mean over three equal gradients may round.
                bound = 1e-6 if name.startswith("third") else 0
                torch.testing.assert_close(read[name], value, rtol=0, atol=bound, msg=f"{kind}")


def read_at_other_stages(folder: str, written_by: int) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Loads what each stage saved under every other, and trains the third step."""
    found = {}
    stages = [stage for stage, kind in KINDS if kind == "adamw"]
    for before, after in itertools.permutations(stages, 2):
        engine = _part_of_a_run(after, "adamw")
        engine.load(Path(folder) / f"{(before, 'adamw')}", ranks=written_by)
        found[before, after] = _third_step(engine)
    return found


@pytest.mark.process
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 2), (1, 2)])
def test_another_zero_stage_goes_on_with_the_same_bits(
    before: int, after: int, tmp_path: Path
) -> None:
    written = dict(zip(KINDS, run_on_ranks(before, write_all, str(tmp_path))[0], strict=True))
    for of_rank in run_on_ranks(after, read_at_other_stages, str(tmp_path), before):
        assert len(of_rank) == 6
        for (by, at), read in of_rank.items():
            due = written[by, "adamw"]
            assert read.keys() == due.keys()
            for name, value in due.items():
                bound = 1e-6 if name.startswith("third") else 0
                said = f"{name}, {by} to {at}"
                torch.testing.assert_close(read[name], value, rtol=0, atol=bound, msg=said)


def _load_with_other_options(folder: str) -> tuple[float, float, float]:
    def build(optimizer: OptimizerConfig, clip: float) -> DeepSpeedEngine:
        config = EngineConfig(zero_stage=2, gradient_clipping=clip)
        module = TwoHeads()
        groups = decay_groups(module, optimizer, set())
        return DeepSpeedEngine(module, config, optimizer, groups, micro_batch_size=4)

    first = build(OPTIMIZER, 0.2)
    first.save(Path(folder))
    first.close()
    second = build(OptimizerConfig(weight_decay=0.3), 0.7)
    second.load(Path(folder), ranks=1)
    optimizer = second._engine.optimizer
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    return decays["decay"], decays["no_decay"], optimizer.clip_grad


@pytest.mark.process
def test_options_of_the_recipe_win_over_those_of_the_checkpoint(tmp_path: Path) -> None:
    assert run_on_ranks(1, _load_with_other_options, str(tmp_path)) == [(0.3, 0.0, 0.7)]


def _skip_a_step() -> tuple[bool, float, bool]:
    config = EngineConfig(zero_stage=1, ema_decay=DECAY)
    module = TwoHeads()
    groups = decay_groups(module, OPTIMIZER, set())
    engine = DeepSpeedEngine(module, config, OPTIMIZER, groups, micro_batch_size=4)
    before = engine.weights(average=False)
    left, right = engine(_batch(0, 0, 0))
    engine.backward((left.sum() + right.sum()) * (float("nan") if distributed.rank() else 1.0))
    result = engine.step(LR)
    same = all(torch.equal(v, before[n]) for n, v in engine.weights(average=False).items())
    return result.skipped, result.grad_norm, same


@pytest.mark.process
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    assert run_on_ranks(2, _skip_a_step) == [(True, float("inf"), True)] * 2


def test_zero_0_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match="ZeRO 0 is not supported.*use 1"):
        EngineConfig(zero_stage=0)


def test_every_key_that_deepspeed_would_guess_is_written() -> None:
    written = deepspeed_config(EngineConfig(zero_stage=3, gradient_clipping=0.5), 7)
    assert written["gradient_clipping"] == 0.5
    assert written["managed_gradient_accumulation"] is False
    assert written["zero_optimization"]["memory_efficient_linear"] is False
    assert written["zero_optimization"]["stage"] == 3
    assert written["train_micro_batch_size_per_gpu"] == 7
    assert written["checkpoint"] == {"tag_validation": "Fail"}


def test_vectors_and_named_matrices_are_not_decayed() -> None:
    decayed, free = decay_groups(TwoHeads(), OPTIMIZER, {"token"})
    assert [tuple(p.shape) for p in decayed.parameters] == [(8, 4), (3, 8), (5, 8)]
    assert [tuple(p.shape) for p in free.parameters] == [(1, 8), (8,), (3,), (5,)]
    assert (decayed.weight_decay, free.weight_decay) == (0.1, 0.0)
