"""Whole runs that go on: with what has moved, and in spite of what has changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data.files import read_json_lines
from data.write_shards import main as write_shards
from distill.runtime.tracking import read_metrics
from tests.tiny_run import assert_same_weights, plain_command, run, write_images, write_recipe

pytestmark = pytest.mark.process

STEPS = 6


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a run, and `run`, as it was after half of its steps."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder, checkpoint={"every": STEPS // 2})
    done = run(plain_command(recipe, f"run.steps={STEPS}", "run.dir=whole"), folder)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "whole", folder / "run")
    shutil.rmtree(folder / f"run/checkpoints/step-{STEPS:08d}")
    return folder


def go_on(stopped: Path, folder: Path, *overrides: str) -> Any:
    """Goes on with a copy of the run."""
    shutil.copytree(stopped / "run", folder / "run")
    here = (f"run.dir={folder / 'run'}", f"run.steps={STEPS}")
    return run(plain_command(stopped / "recipe.yaml", *here, *overrides), stopped)


def test_with_moved_shards_and_other_workers_a_run_ends_with_the_same_bits(
    stopped: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(stopped / "shards", moved)
    changes = (f"data.sources=[{{shards: {moved}}}]", "data.workers=1", "data.prefetch=3")
    done = go_on(stopped, tmp_path, *changes)
    assert done.returncode == 0, done.stderr
    assert_same_weights(stopped / "whole", tmp_path / "run", STEPS)
    assert not (tmp_path / "run/changes.jsonl").exists()


def test_other_images_are_told_and_taken_only_when_asked_for(stopped: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", count=12)
    assert write_shards([str(tmp_path / "images"), str(tmp_path / "other")]) == 0
    other = f"data.sources=[{{shards: {tmp_path / 'other'}}}]"
    done = go_on(stopped, tmp_path, other)
    assert done.returncode == 2
    assert "  data.sources.0.shards -> other images: the stream differs from the first step" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "run")
    done = go_on(stopped, tmp_path, other, "run.resume=anyway", "optimizer.lr=0.002")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    noted = read_json_lines(tmp_path / "run/changes.jsonl")
    assert [(row["step"], row["key"]) for row in noted] == [
        (STEPS // 2, "optimizer.lr"),
        (STEPS // 2, "data.sources.0.shards"),
    ]


def test_a_student_that_the_checkpoint_does_not_fit_is_one_message(
    stopped: Path, tmp_path: Path
) -> None:
    done = go_on(stopped, tmp_path, "student.width=64", "run.resume=anyway")
    assert done.returncode == 1
    assert "error: no checkpoint can be read:" in done.stderr
    assert "Traceback" not in done.stderr
