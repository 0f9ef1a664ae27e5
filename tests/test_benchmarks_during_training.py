"""Benchmarks during training: when they run, what they leave unchanged, and their errors."""

import faulthandler
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import DataError
from distill.benchmarks.during_training import (
    TrainingBenchmarks,
    TrainingBenchmarksConfig,
    check_encoder,
    examine_data,
)
from distill.evaluation.models import Pixels, PixelsConfig
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.runtime.tracking import Tracker, TrackingConfig, read_metrics
from distill.tasks.student_recipe import StudentRecipe
from distill.training.loop import Loop
from teachers.errors import TeacherError
from tests.doubles import Curved, MeanColours
from tests.label_sets import halves, write_labels

RAMP = {"ramp": {"kind": "tests.doubles:Ramp"}}


def pixels() -> Pixels:
    return Pixels(PixelsConfig(patch_size=8, resolution=(32, 32)))


def benchmarks(folder: Path, run: dict[str, Any] = RAMP, every: int = 10) -> TrainingBenchmarks:
    config = validate(TrainingBenchmarksConfig, {"every": every, "run": run}, "recipe")
    return TrainingBenchmarks(config, pixels, folder, num_steps=25)


def tracker(folder: Path, start_step: int = 0) -> Tracker:
    return Tracker(folder, TrackingConfig(), {}, num_steps=25, start_step=start_step, active=True)


def test_they_are_due_at_the_first_start_regularly_and_at_the_end(tmp_path: Path) -> None:
    found = benchmarks(tmp_path)
    with tracker(tmp_path) as open_tracker:
        due = []
        for step in range(26):
            if found.due(step):
                due.append(step)
                found.measure(found.due(step), step, open_tracker)
    assert due == [0, 10, 20, 25]
    assert [line["step"] for line in read_metrics(tmp_path)] == due
    assert read_metrics(tmp_path)[0]["eval/ramp/largest"] > 0


def test_a_resumed_run_measures_what_has_no_figures_at_its_step(tmp_path: Path) -> None:
    with tracker(tmp_path) as open_tracker:
        for step in (0, 10):
            benchmarks(tmp_path).measure(["ramp"], step, open_tracker)
    assert benchmarks(tmp_path).due(10) == []
    assert benchmarks(tmp_path, every=5).due(5) == ["ramp"]  # stopped before it was measured
    assert benchmarks(tmp_path).due(5) == []
    assert benchmarks(tmp_path, {**RAMP, "new": RAMP["ramp"]}).due(7) == ["new"]
    with tracker(tmp_path, start_step=6):  # step 10 will be done again
        assert benchmarks(tmp_path).due(10) == ["ramp"]


def test_the_default_generators_are_left_as_they_were(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(torch.rand(1)), float(np.random.rand())]

    def seed() -> None:
        random.seed(1), torch.manual_seed(1), np.random.seed(1)

    seed()
    expected = draws()
    seed()
    with tracker(tmp_path) as open_tracker:
        benchmarks(tmp_path).measure(["ramp"], 0, open_tracker)
    assert draws() == expected


def test_the_watchdog_is_off_while_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is over already: nothing is left but to measure."""
    events: list[str] = []
    arm, disarm = "dump_traceback_later", "cancel_dump_traceback_later"
    monkeypatch.setattr(faulthandler, arm, lambda seconds, exit: events.append(f"{seconds}"))
    monkeypatch.setattr(faulthandler, disarm, lambda: events.append("off"))

    class Noted(TrainingBenchmarks):
        def measure(self, *arguments: Any) -> None:
            events.append("measure")

    found = benchmarks(tmp_path)
    run = {"dir": tmp_path, "steps": 25, "resolution": 32, "batch_size": 1}
    recipe = StudentRecipe.model_validate(
        {
            "run": run,
            "data": {"sources": [{"shards": str(tmp_path)}]},
            "teachers": {"expert": {"kind": "timm", "model": "test_vit"}},
            "student": {"size": "tiny"},
        }
    )
    noted = Noted(found._config, pixels, tmp_path, 25)
    nothing: Any = None
    with tracker(tmp_path) as open_tracker:
        loop = Loop(recipe, recipe.step_plan(1), nothing, open_tracker, nothing, nothing, noted)
        assert loop.run(iter([]), 25, 25) == "done"
    assert events == ["measure"]


def test_missing_data_are_told_with_the_place_in_the_recipe(tmp_path: Path) -> None:
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "camvid", "root": str(tmp_path / "nowhere")},
        "probe": {"steps": 1, "batch_size": 1, "lr": 0.1},
    }
    found = benchmarks(tmp_path, {"streets": entry})
    message = r"(?s)benchmarks\.run\.streets: there is no .*nowhere.*expected under"
    with tracker(tmp_path) as open_tracker, pytest.raises(DataError, match=message):
        found.measure(["streets"], 0, open_tracker)


def streets(root: Path, **changes: Any) -> TrainingBenchmarksConfig:
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "folder", "root": str(root), "classes": ["a", "b"]},
        "probe": {"steps": 1, "batch_size": 1, "lr": 0.1},
    }
    return validate(
        TrainingBenchmarksConfig, {"every": 5, "run": {"streets": entry | changes}}, "x"
    )


def test_data_are_examined_before_the_run_and_other_data_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maps = {"train": [halves(0, 1)], "test": [halves(1, 0)]}
    write_labels(tmp_path / "set", maps)
    for _ in range(2):
        examine_data(streets(tmp_path / "set"), tmp_path / "run")
    assert (tmp_path / "run/benchmarks/streets/data.json").is_file()
    assert "have changed" not in caplog.text
    write_labels(tmp_path / "set", {"test": [halves(1, 1), halves(0, 1)]})
    examine_data(streets(tmp_path / "set"), tmp_path / "run")
    assert "benchmarks.run.streets: its data have changed since the run began" in caplog.text
    write_labels(tmp_path / "set", {"train": [halves(0, 255)]})
    with pytest.raises(
        DataError,
        match=r"(?s)benchmarks\.run\.streets: .*\nTo measure all the same: "
        r"benchmarks\.accepted_data=\[streets\]",
    ):
        examine_data(streets(tmp_path / "set"), None)


def test_a_student_that_does_not_fit_is_told_before_the_run(tmp_path: Path) -> None:
    write_labels(tmp_path / "set", {"train": [halves(0, 1)], "test": [halves(1, 0)]})
    check_encoder(streets(tmp_path / "set"), MeanColours(4, (8, 8), any_resolution=True))
    with pytest.raises(TeacherError, match=r"benchmarks\.run\.streets: images of 8 x 8 px: this"):
        check_encoder(streets(tmp_path / "set"), Curved())


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"every": 0, "run": RAMP}, "every"),
        ({"every": 1, "run": RAMP, "accepted_data": ["rampp"]}, "did you mean 'ramp'"),
        ({"every": 1, "run": {}}, "run"),
        ({"every": 1, "run": {"a/b": RAMP["ramp"]}}, r"run\.a/b"),
        ({"every": 1, "run": {"x": {"kind": "segmentatio"}}}, r"run\.x: .*'segmentation'"),
    ],
)
def test_a_wrong_entry_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(TrainingBenchmarksConfig, tree, "recipe")
