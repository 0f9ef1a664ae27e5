"""The lines of metrics, and trackers' copies: whatever the numbers are, and none twice."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.runtime.tracking import Tracker, TrackingConfig, read_metrics
from tests.trackers import mlflow_run, mlflow_values, tensorboard_pictures, tensorboard_values

NUMBERS = {"loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "images_per_s": 3.0, "time/data": 0.0}


def _tracker(folder: Path, start_step: int = 0, *, active: bool = True, **config: Any) -> Tracker:
    recipe = {"run": {"steps": 9}}
    tracking = TrackingConfig(**config)
    return Tracker(folder, tracking, recipe, num_steps=9, start_step=start_step, active=active)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Python would write Infinity, which no other reader of JSON takes."""
    with _tracker(tmp_path) as tracker:
        tracker.training_metrics(1, {**NUMBERS, "grad_norm": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, **NUMBERS, "grad_norm": None}


def test_lines_behind_the_step_that_a_run_resumes_from_are_cut(tmp_path: Path) -> None:
    with _tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.training_metrics(step, NUMBERS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    with _tracker(tmp_path, start_step=2) as tracker:
        tracker.training_metrics(3, {**NUMBERS, "loss": 7.0})
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 7)]


def test_a_rank_that_works_longer_than_the_others_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _tracker(tmp_path) as tracker:
        for step, work in ((1, 1.05), (2, 1.4)):
            tracker.training_metrics(
                step, {**NUMBERS, "slowest_rank": 3.0, "slowest_rank_work": work}
            )
    even, uneven = capsys.readouterr().err.splitlines()
    assert even.endswith("data 0%")
    assert uneven.endswith("data 0%  rank 3 works 1.40 x the mean")


@pytest.mark.process  # mlflow asks for the processor when it is imported
@pytest.mark.long
def test_tensorboard_and_mlflow_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    folder, picture = tmp_path / "run", tmp_path / "run/step.png"
    folder.mkdir()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(picture)
    trackers: dict[str, Any] = {"tensorboard": True, "mlflow": "local"}
    with _tracker(folder, **trackers) as tracker:
        for step in (1, 2, 3, 4):
            tracker.training_metrics(step, NUMBERS | {"loss/clip/spatial": 1.0})
        tracker.picture(2, "features", picture)
        tracker.metrics(4, {"eval/pets/top-1": 0.5, "grad_norm": math.inf})
    with _tracker(folder, 2, **trackers) as tracker:  # from a checkpoint of step 2
        for step in (3, 4, 5):
            tracker.training_metrics(step, NUMBERS | {"loss/clip/spatial": 7.0})
    for name in ("loss", "loss/clip/spatial"):
        written = [(line["step"], line[name]) for line in read_metrics(folder)]
        assert tensorboard_values(folder)[name] == written  # the last that was written
        first = [(step, 1.0 if step < 5 or name == "loss" else 7.0) for step, _ in written]
        assert mlflow_values(folder)[name.replace("/", ".")] == first  # the first
    assert mlflow_values(folder)["eval.pets.top-1"] == [(4, 0.5)]
    assert [step for step, _ in mlflow_values(folder)["grad_norm"]] == [1, 2, 3, 4, 5]
    assert tensorboard_pictures(folder) == {"features": [2]}
    run = mlflow_run(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert list((folder / "mlruns").rglob("features/00000002/step.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.process  # mlflow asks for the processor when it is imported
@pytest.mark.long
def test_a_run_that_fails_has_failed_in_mlflow(tmp_path: Path) -> None:
    with pytest.raises(KeyError), _tracker(tmp_path, mlflow="local", name="mine"):
        raise KeyError
    run = mlflow_run(tmp_path)
    assert (run.info.status, run.info.run_name) == ("FAILED", "mine")


def test_other_ranks_start_no_tracker(tmp_path: Path) -> None:
    with _tracker(tmp_path, active=False, tensorboard=True, mlflow="local", wandb="offline") as all:
        all.training_metrics(1, NUMBERS)
        all.picture(1, "features", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "config", "package", "off"),
    [
        ("wandb", {"wandb": "offline"}, "wandb", "wandb=disabled"),
        ("tensorboard", {"tensorboard": True}, "tensorboard", "tensorboard=false"),
        ("mlflow.entities", {"mlflow": "local"}, "mlflow-skinny", "mlflow=null"),
    ],
)
def test_a_tracker_that_is_not_installed_is_told_with_the_cure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    config: dict[str, Any],
    package: str,
    off: str,
) -> None:
    for name in [each for each in sys.modules if each.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=f"`pip install {package}`, or set tracking.{off}"):
        _tracker(tmp_path, **config)


def test_a_place_for_mlflow_that_is_none_is_refused() -> None:
    """It would be a folder of that name, wherever the command runs."""
    with pytest.raises(
        RecipeError, match="mlflow.*expected local or the URI.*did you mean 'local'"
    ):
        validate(TrackingConfig, {"mlflow": "locale"}, "recipe.yaml")
    for place in ("local", "http://host:5000", "databricks", "file:///shared/mlruns", None):
        assert TrackingConfig(mlflow=place).mlflow == place


@pytest.mark.process  # mlflow asks for the processor when it is imported
@pytest.mark.long
def test_a_server_that_does_not_answer_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RecipeError, match="tracking.mlflow: http://127.0.0.1:9 cannot be used: "):
        _tracker(tmp_path, mlflow="http://127.0.0.1:9")
