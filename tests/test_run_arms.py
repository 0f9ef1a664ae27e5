"""Whole runs of arms: in turn, on ranks of their own, resumed, and with other ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.runtime.tracking import read_metrics
from tests.tiny_run import (
    assert_same_weights,
    plain_command,
    run,
    tiny_recipe,
    write_recipe,
)

pytestmark = pytest.mark.process

STEPS = 6
EXPERT = {"kind": "timm", "model": "test_vit", "weights": "none"}
ARMS = {
    "low": {
        "resolution": [{"size": 32, "probability": 0.5}, {"size": [32, 48], "probability": 0.5}],
        "batch_size": 4,
        "micro_batch_size": 2,
        "ranks": 1,
    },
    "high": {
        "resolution": [{"size": 64, "end": 3}, {"size": 48, "start": 3, "batch_size": 4}],
        "batch_size": 2,
        "micro_batch_size": 1,
        "teachers": ["expert"],
        "ranks": 1,
    },
}
ARMS["high"]["resolution"][1]["micro_batch_size"] = 2  # type: ignore[index]


def sections(**others: Any) -> dict[str, Any]:
    return {
        "teachers": {
            "expert": {**EXPERT, "resolution": [32, 32]},
            "other": {**EXPERT, "resolution": [48, 48]},
        },
        "arms": ARMS,
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "checkpoint": {"every": 100},
        **others,
    }


def recipe_in(folder: Path, shards: Path | None = None, **others: Any) -> Path:
    """A recipe of arms, without the size and the batch that a run without arms has."""
    found = sections(**others)
    if shards is not None:
        found["data"] = {"sources": [{"shards": str(shards / "shards")}]}
    tree = tiny_recipe(folder, **found)
    run_of = {k: v for k, v in tree["run"].items() if k not in ("resolution", "batch_size")}
    return write_recipe(folder, **found, run={"resolution": None, "batch_size": None, **run_of})


def position_of(folder: Path, step: int) -> dict[str, int]:
    manifest = folder / f"run/checkpoints/step-{step:08d}/MANIFEST.json"
    position: dict[str, int] = json.loads(manifest.read_text())["stream"]["position"]
    return position


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of both arms in one process."""
    folder = tmp_path_factory.mktemp("arms")
    done = run(plain_command(recipe_in(folder), f"run.steps={STEPS}"), folder)
    assert done.returncode == 0, done.stderr
    assert "low   4              32 x 48     2 x 3  other" in done.stderr
    return folder


def test_every_arm_is_logged_with_its_teachers(finished: Path) -> None:
    lines = read_metrics(finished / "run")
    images = [line["images"] for line in lines]
    assert images == [6, 12, 18, 26, 34, 42]  # the large images come in fours from step 3 on
    for line in lines:
        for name in ("low/expert", "low/other", "high/expert"):
            for part in ("summary", "spatial"):
                assert line[f"loss/{name}/{part}"] > 0
        assert not any(name.startswith("loss/high/other") for name in line)
        large = 4 if line["step"] > 3 else 2
        arms = [line[f"loss/{arm}/expert/spatial"] for arm in ("low", "high")]
        mean = (4 * arms[0] + large * arms[1]) / (4 + large)
        assert line["loss/expert/spatial"] == pytest.approx(mean, rel=1e-5)
        assert line["loss/other/spatial"] == pytest.approx(line["loss/low/other/spatial"])


@pytest.mark.parametrize("stopped", [2, 4])
def test_a_run_that_is_resumed_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, stopped: int
) -> None:
    """In either stage of the second arm."""
    recipe = recipe_in(tmp_path, finished)
    for steps in (stopped, STEPS):
        done = run(plain_command(recipe, f"run.steps={steps}"), tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_weights(finished / "run", tmp_path / "run", STEPS)
    names = ("loss", "images", "grad_norm")
    expected, came = (read_metrics(folder / "run") for folder in (finished, tmp_path))
    assert [[line[n] for n in names] for line in came] == [
        [line[n] for n in names] for line in expected
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_from_two_ranks_to_one_and_back_no_sample_is_lost_or_repeated(
    finished: Path, tmp_path: Path, stage: int
) -> None:
    """Each arm has a rank, then one process both, then each a rank again.

    The images, their sizes and their position windows are those of the one process, so that the
    losses agree to rounding.
    """
    recipe = recipe_in(tmp_path, finished, engine={"zero_stage": stage})
    for steps, ranks in ((2, 2), (4, 1), (STEPS, 2)):
        done = run(plain_command(recipe, f"run.steps={steps}"), tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert position_of(tmp_path, steps) == {
            "step": steps,
            "samples": {2: 12, 4: 26, 6: 42}[steps],
        }
    expected, came = (read_metrics(folder / "run") for folder in (finished, tmp_path))
    assert len(came) == STEPS
    for one, other in zip(expected, came, strict=True):
        for name in (name for name in one if name.startswith(("loss", "images", "grad"))):
            if name != "images_per_s":
                assert other[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)
    name = f"run/checkpoints/step-{STEPS:08d}/student.safetensors"
    expected_weights, weights = (load_file(folder / name) for folder in (finished, tmp_path))
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=2e-3, msg=key)


def test_the_dry_run_shows_the_routes_and_an_impossible_one_ends_with_2(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    done = run([*plain_command(recipe), "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "high  4              48 x 48     3 x 3  expert" in done.stdout
    done = run([*plain_command(recipe), "--dry-run", "targets.routes.expert=upsampler"], tmp_path)
    assert done.returncode == 2
    assert "targets.routes.expert: students of 32 x 32 px have a grid of" in done.stderr
    assert "Traceback" not in done.stderr
