"""The loop around its steps: what the watchdog covers, and where a request to stop ends it."""

import faulthandler
import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import Batch
from distill.engine.engine import StepResult
from distill.objective.objective import LossTerms
from distill.runtime.stopping import Stopped, listening
from distill.runtime.tracking import Tracker, TrackingConfig
from distill.tasks.student_recipe import StudentRecipe
from distill.training.loop import Loop

STEPS = 4


class Noting:
    """A task, its engine, its benchmarks and the writer of its checkpoints: they only take note.

    Args:
        asked_in: the event at which this process is asked to stop.
        due: steps after which there is a benchmark.
    """

    def __init__(self, asked_in: str = "", due: Sequence[int] = ()) -> None:
        self.events: list[str] = []
        self.engine, self._asked_in, self._due, self._step = self, asked_in, due, 0

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self._asked_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def loss(self, images: Tensor, micro_batch: object) -> LossTerms:
        self.note(f"step {self._step}")
        return LossTerms(torch.ones(()), {})

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self, lr: float) -> StepResult:
        self._step += 1
        return StepResult(0.0, False, 1.0)

    def draw(self, images: Tensor, micro_batch: object, path: Path) -> None:
        self.note("draw")

    def save(self, step: int) -> None:
        self.note(f"save {step}")

    def due(self, step: int) -> list[str]:
        return ["benchmark"] if step in self._due else []

    def measure(self, names: Sequence[str], step: int, tracker: Tracker) -> None:
        self.note(f"measure {step}")


def train(folder: Path, noting: Noting, **targets: Any) -> str:
    recipe = StudentRecipe.model_validate(
        {
            "run": {"dir": folder, "steps": STEPS, "resolution": 32, "batch_size": 1},
            "data": {"sources": [{"shards": "x"}]},
            "teachers": {"expert": {"kind": "timm", "model": "test_vit"}},
            "student": {"size": "tiny"},
            "schedule": {"warmup_steps": 0},
            "checkpoint": {"every": 2},
            "tracking": {"pictures_every": 3},
            "targets": targets,
        }
    )
    task: Any = noting
    batches = itertools.repeat(Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["x"], ()))
    tracking: dict[str, Any] = {"num_steps": STEPS, "start_step": 0, "active": True}
    with listening() as stop, Tracker(folder, TrackingConfig(), {}, **tracking) as tracker:
        loop = Loop(recipe, recipe.step_plan(1), task, tracker, noting.save, stop, task)
        return loop.run(iter(batches), 0, 0)


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Noting], None]:
    """Notes among the events where the watchdog is armed and where it is not any longer."""

    def note_in(noting: Noting) -> None:
        arm, disarm = "dump_traceback_later", "cancel_dump_traceback_later"
        monkeypatch.setattr(faulthandler, arm, lambda limit, exit: noting.note(f"arm {limit:g}"))
        monkeypatch.setattr(faulthandler, disarm, lambda: noting.note("off"))

    return note_in


def test_the_watchdog_covers_each_step_and_nothing_else(
    tmp_path: Path, armed: Callable[[Noting], None]
) -> None:
    noting = Noting(due=[0, 4])
    armed(noting)
    assert train(tmp_path, noting) == "done"
    steps = [["arm 900", f"step {step}", "off"] for step in range(STEPS)]
    assert noting.events == [
        *("measure 0", *steps[0], *steps[1], "save 2", *steps[2], "draw", *steps[3]),
        *("save 4", "measure 4"),
    ]


def test_nor_does_it_cover_a_step_in_which_kernels_compile(
    tmp_path: Path, armed: Callable[[Noting], None]
) -> None:
    noting = Noting()
    armed(noting)
    train(tmp_path, noting, compile=True)
    assert noting.events[:5] == ["step 0", "off", "arm 900", "step 1", "off"]


@pytest.mark.parametrize(
    ("asked_in", "last"),
    [
        ("step 0", ["step 0"]),  # nothing is new yet
        ("measure 0", ["measure 0"]),
        ("measure 3", ["save 3", "measure 3"]),  # the steps before a benchmark are saved
    ],
)
def test_work_that_keeps_nothing_ends_at_once(
    asked_in: str, last: list[str], tmp_path: Path
) -> None:
    noting = Noting(asked_in, due=[0, 3])
    with pytest.raises(Stopped):
        train(tmp_path, noting)
    assert noting.events[-len(last) :] == last


@pytest.mark.parametrize("asked_in", ["step 2", "save 2"])
def test_a_later_step_comes_to_its_end_and_is_saved(asked_in: str, tmp_path: Path) -> None:
    noting = Noting(asked_in)
    assert train(tmp_path, noting) == "preempted"
    assert noting.events == ["step 0", "step 1", "save 2", "step 2", "draw", "save 3"]
