"""Whole runs with every option of the objective on: resumed to the bit, and on two ranks."""

from pathlib import Path
from typing import Any

import pytest

from distill.tracking import read_metrics
from tests.tiny_run import (
    STEPS,
    assert_same_weights,
    launcher_command,
    plain_command,
    run,
    start,
    wait_for_metrics,
    write_recipe,
)

EXPERT = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 32]}
SECTIONS: dict[str, Any] = {
    "teachers": {"expert": EXPERT, "other": {**EXPERT, "model": "test_vit2"}},
    "objective": {
        "summary": "angle",
        "equivariance": {"kind": "shift", "limit": 1},
        "mesa": {"weight": 0.5, "start_step": 4},
        "dropping": 0.5,
        "balancing": {"decay": 0.9},
        "tolerated_non_finite": 3,
    },
    "tracking": {"every": 1, "pictures_every": 12},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(plain_command(write_recipe(folder, **SECTIONS)), folder)
    assert done.returncode == 0, done.stderr
    return folder


def beside(finished: Path, folder: Path) -> Path:
    data = {"sources": [{"shards": str(finished / "shards")}]}
    return write_recipe(folder, **SECTIONS, data=data)


def test_each_part_is_logged_and_mesa_from_its_first_step_on(finished: Path) -> None:
    metrics = read_metrics(finished / "run")
    parts = {f"loss/{t}/{p}" for t in ("expert", "other") for p in ("summary", "spatial")}
    assert all(parts <= line.keys() for line in metrics)
    assert [line["step"] for line in metrics if "loss/mesa" in line] == list(range(5, STEPS + 1))
    assert metrics[-1]["loss/mesa"] > 0
    assert len(list((finished / "run/pictures").glob("*.png"))) == 2


def test_a_killed_run_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """Average, running means and statistics come from the checkpoint, not from the folder."""
    recipe = beside(finished, tmp_path)
    process = start(plain_command(recipe), tmp_path)
    for _ in range(5):
        wait_for_metrics(tmp_path / "run", process)
    process.kill()
    process.wait()
    assert len(read_metrics(tmp_path / "run")) < STEPS
    for path in (tmp_path / "run/statistics").iterdir():
        path.unlink()
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert_same_weights(finished / "run", tmp_path / "run", STEPS)
    one, other = (read_metrics(folder / "run")[-1] for folder in (finished, tmp_path))
    assert {k: v for k, v in one.items() if "loss" in k} == {
        k: v for k, v in other.items() if "loss" in k
    }


@pytest.mark.launcher
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_under_the_launcher(stage: int, finished: Path, tmp_path: Path) -> None:
    recipe = beside(finished, tmp_path)
    done = run(launcher_command(recipe, f"engine.zero_stage={stage}", ranks=2), tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[-1]["loss/mesa"] > 0


FAULTY_TEACHER = """
import torch
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher

class Faulty(Teacher):
    def __init__(self, config):
        spec = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=16, resolution=(32, 32))
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.calls = 0

    def extract(self, images):
        self.calls += 1
        maps = images.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).repeat(1, 2, 1, 1)[:, :4]
        return Features(None, maps * (float("nan") if self.calls in (12, 14, 16) else 1.0))
"""


@pytest.mark.parametrize("tolerated", [2, 3])
def test_losses_that_are_not_finite_are_named_and_end_the_run_beyond_those_tolerated(
    tolerated: int, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY_TEACHER)
    recipe = write_recipe(
        tmp_path,
        data={"sources": [{"shards": str(finished / "shards")}]},
        teachers={"expert": EXPERT, "broken": {"kind": "faulty:Faulty"}},
        objective={"tolerated_non_finite": tolerated},
    )
    done = run(plain_command(recipe), tmp_path)
    assert done.stderr.count("not finite, so left out:\n  rank 0: broken/spatial; keys: ") == (
        tolerated
    )
    assert "000000.tar/" in done.stderr
    if tolerated == 3:
        assert done.returncode == 0, done.stderr
        assert sum(x["non_finite/broken/spatial"] for x in read_metrics(tmp_path / "run")) == 3
    else:
        assert done.returncode == 1
        assert "so the run stops:\n  rank 0: loss, loss/broken/spatial; keys: " in done.stderr
