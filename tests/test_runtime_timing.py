"""Where a step's time goes, by a clock that moves one second at every look at it."""

import itertools

import pytest
import torch
from torch import nn

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.engine_config import EngineConfig
from distill.engine.optimizer import OptimizerConfig, decay_groups
from distill.runtime import timing
from tests.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def _seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_now", map(float, itertools.count()).__next__)


def test_a_part_leaves_out_the_parts_inside_it_and_all_sum_to_the_whole() -> None:
    with timing.measured() as clock:  # 0
        with timing.timed("student"):  # 1
            with timing.timed("teacher/clip"):  # 2 to 3
                pass
            with timing.timed("teacher/clip"):  # 4 to 5
                pass
        # 6
        assert clock.read() == {"other": 2.0, "student": 3.0, "teacher/clip": 2.0}  # at 7
        clock.restart()  # 8
        assert clock.read() == {"other": 1.0}


def test_a_part_that_fails_is_closed() -> None:
    with timing.measured() as clock:
        with pytest.raises(KeyError), timing.timed("data"):
            raise KeyError
        assert clock.read() == {"other": 2.0, "data": 1.0}


def test_without_a_clock_nothing_is_kept_and_an_outer_one_comes_back() -> None:
    with timing.timed("data"):
        pass
    with timing.measured() as outer:
        with timing.measured(), timing.timed("data"):
            pass
        with timing.timed("optimizer"):
            pass
        assert outer.read().keys() == {"other", "optimizer"}


def test_one_process_has_shares_and_no_slowest_rank() -> None:
    assert timing.shares([{"data": 1.0, "student": 3.0}]) == {
        "time/data": 0.25,
        "time/student": 0.75,
    }


def test_the_slowest_rank_is_the_one_that_works_not_the_one_that_waits() -> None:
    waits = {"student": 2.0, "communication": 6.0}
    reads = {"student": 2.0, "data": 4.0, "communication": 2.0}
    assert timing.shares([waits, reads]) == {
        "time/communication": 0.5,
        "time/data": 0.25,
        "time/student": 0.25,
        "slowest_rank": 1.0,
        "slowest_rank_work": 1.5,
    }


def parts_of_a_step(stage: int) -> set[str]:
    module = nn.Linear(4, 4)
    optimizer = OptimizerConfig()
    groups = decay_groups(module, optimizer, set())
    config = EngineConfig(zero_stage=stage)
    for _ in range(2):  # a second engine finds the first one's backend
        engine = DeepSpeedEngine(module, config, optimizer, groups, micro_batch_size=1)
        with timing.measured() as clock:
            with timing.timed("student"):
                engine.backward(engine(torch.ones(1, 4)).sum())
            with timing.timed("optimizer"):
                engine.step(0.1)
            found = clock.read()
    return set(found)


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engines_collectives_are_communication(stage: int) -> None:
    due = {"other", "student", "optimizer", "communication"}
    assert run_on_ranks(2, parts_of_a_step, stage) == [due, due]
