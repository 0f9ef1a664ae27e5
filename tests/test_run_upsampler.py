"""Whole runs of train_upsampler as a user starts them, and the student that uses their file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from distill.runtime.checkpoint import find_checkpoints
from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.tracking import read_metrics
from distill.tasks.upsampler_recipe import load_upsampler_recipe
from distill.tasks.upsampler_run import base_resolution
from distill.train_upsampler import main
from teachers.features import FeatureSpec
from teachers.upsamplers.trained import load_downsampler, load_upsampler
from tests.test_run_student import NAN_TEACHER
from tests.tiny_run import (
    plain_command,
    run,
    run_until_killed,
    tiny_recipe,
    write_recipe,
)

pytestmark = pytest.mark.process

STEPS = 10
TEACHER = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [48, 64]}
LAST = f"checkpoints/step-{STEPS:08d}/upsampler.safetensors"


def write(folder: Path, shards: Path | None = None, **sections: Any) -> Path:
    """A recipe for a FeatSharp of factor (2, 1), over shards of its own or given ones."""
    tree = tiny_recipe(folder) if shards is None else {}
    recipe = {
        "task": "upsampler",
        "run": {"dir": str(folder / "run"), "steps": STEPS, "batch_size": 4},
        "data": tree.get("data", {"sources": [{"shards": str(shards)}], "workers": 0}),
        "teacher": TEACHER,
        "upsampler": {"kind": "featsharp", "factor": [2, 1], "inputs": ["jbu", "tiles"]},
        "spectral": True,
        "consistency": {"uncertainty_dim": 16},
        "targets": {"statistics_images": 16},
        "schedule": {"warmup_steps": 2},
        "engine": {"zero_stage": 1},
        "checkpoint": {"every": 2},
        "tracking": {"every": 1},
    }
    for name, section in sections.items():
        same = isinstance(section, dict) and name != "upsampler" and "kind" not in section
        recipe[name] = {**recipe.get(name, {}), **section} if same else section
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(recipe))
    return path


def upsampler(command: list[str]) -> list[str]:
    """The command of tiny_run, for the other trainer."""
    module = {"distill.train_student": "distill.train_upsampler"}
    return [module.get(part, part) for part in command]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run that draws."""
    folder = tmp_path_factory.mktemp("finished")
    command = upsampler(plain_command(write(folder), "tracking.pictures_every=5"))
    done = run(command, folder, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_metrics_pictures_and_a_file_that_loads_in_one_line(finished: Path) -> None:
    folder = finished / "run"
    assert json.loads((folder / "STATUS.json").read_text())["status"] == "done"
    assert [int(p.name[-8:]) for p in find_checkpoints(folder / "checkpoints")] == [10, 8]
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        parts = line["loss/reconstruction"] + line["loss/uncertainty"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4, abs=1e-6)
        assert line["mse"] > 0
        assert line["grad_norm"] > 0
    assert [line["lr"] for line in metrics[:2]] < [5e-4, 5e-4]
    pictures = sorted((folder / "pictures").iterdir())
    assert [p.name for p in pictures] == ["step-00000005.png", "step-00000010.png"]
    assert Image.open(pictures[0]).width > 3 * 64
    loaded = load_upsampler(folder / LAST)
    assert loaded.factor == (2, 1)
    assert loaded.card.facts["recipe"]["run"]["steps"] == STEPS
    assert loaded.card.teacher["model"] == "test_vit"
    assert not any("parametrizations" in name for name in load_file(folder / LAST))
    assert load_downsampler(folder / LAST).factor == (2, 1)


def test_killed_in_a_save_it_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    command = upsampler(plain_command(write(tmp_path, finished / "shards")))
    run_until_killed(command, tmp_path, at=".tmp-step-00000006/upsampler.safetensors")
    assert len(read_metrics(tmp_path / "run")) == 6
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    one, other = load_file(finished / "run" / LAST), load_file(tmp_path / "run" / LAST)
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_two_ranks_accumulate_in_bf16_under_zero_3(finished: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, finished / "shards", targets={"precision": "bf16"})
    overrides = ["engine.zero_stage=3", "engine.precision=bf16", "run.micro_batch_size=1"]
    overrides += ["run.steps=3", "tracking.pictures_every=3"]
    done = run(upsampler(plain_command(recipe, *overrides)), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "run")
    assert [line["images"] for line in metrics] == [4, 8, 12]
    assert (tmp_path / "run/pictures/step-00000003.png").exists()
    came = load_upsampler(tmp_path / "run/checkpoints/step-00000003/upsampler.safetensors")
    # The same teacher, data and first weights, though another precision.
    due = load_upsampler(finished / "run" / LAST)
    assert came.card.fingerprint == due.card.fingerprint
    assert (came.phi_s.mean - due.phi_s.mean).norm() < 0.05 * due.phi_s.mean.norm()


def test_the_file_drives_a_students_run(finished: Path, tmp_path: Path) -> None:
    teacher = TEACHER | {"upsampler": str(finished / "run" / LAST)}
    recipe = write_recipe(
        tmp_path,
        data={"sources": [{"shards": str(finished / "shards")}]},
        teachers={"expert": teacher},
        run={"dir": str(tmp_path / "run"), "steps": 3},
    )
    done = run(plain_command(recipe, "schedule.warmup_steps=0"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(line["loss/expert/spatial"] > 0 for line in read_metrics(tmp_path / "run"))


def test_export_writes_the_card_with_step_and_fidelity(finished: Path, tmp_path: Path) -> None:
    run_folder, out = finished / "run", tmp_path / "kept" / "sharp.safetensors"
    images = str(finished / "images")
    module = [sys.executable, "-m"]
    measured = [*module, "distill.evaluate", str(run_folder), f"evaluation.images={images}"]
    assert run(measured, finished).returncode == 0
    export = [*module, "distill.export", str(run_folder), str(out)]
    done = run([*export, "--half"], finished)
    assert done.returncode == 0, done.stderr
    facts = load_upsampler(out).card.facts
    assert (facts["steps"], facts["images_seen"]) == (STEPS, STEPS * 4)
    assert facts["fidelity"]["own"] > 0
    assert "dir" not in facts["recipe"]["run"]  # nor any other place on this machine
    assert facts["recipe"]["data"]["sources"][0]["shards"] == ["shards"]
    whole = run_folder / f"checkpoints/step-{STEPS:08d}/upsampler.safetensors"
    assert out.stat().st_size < 0.7 * whole.stat().st_size
    again = run(export, finished)
    assert again.returncode == 2
    assert "already exists; --force overwrites it" in again.stderr
    wrong = run([*export, "--force", "--head", "clip"], finished)
    assert wrong.returncode == 2
    assert "are for students; this is an upsampler" in wrong.stderr


def test_nan_stops_the_run_with_the_keys_of_the_batch(finished: Path, tmp_path: Path) -> None:
    """The teacher is a user's own class, found in the current directory."""
    faulty = NAN_TEACHER.replace("resolution=(32, 32)", "resolution=(48, 64)")
    (tmp_path / "faulty.py").write_text(faulty.replace("> 12", "> 9"))
    recipe = write(
        tmp_path,
        finished / "shards",
        teacher={"kind": "faulty:Faulty"},
        upsampler={"kind": "bilinear", "factor": 2},
    )
    done = run(upsampler(plain_command(recipe)), tmp_path)
    assert done.returncode == 1
    assert "not finite, so the run stops:\n  rank 0: loss, loss/reconstruction" in done.stderr
    assert "000000.tar/" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"kind": "featsharp", "factor": 2, "num_heads": 7}, "num_heads: 7 heads do not divide"),
        ({"kind": "s2", "factor": 2, "beta": None}, "from 64 to 128 channels cannot run in stand"),
    ],
)
def test_an_upsampler_that_does_not_fit_its_encoder_is_a_mistake_in_the_recipe(
    entry: dict[str, Any], message: str, finished: Path, tmp_path: Path
) -> None:
    recipe = load_upsampler_recipe(write(tmp_path, finished / "shards", upsampler=entry), [])
    spec = FeatureSpec(summary_dim=None, spatial_dim=64, patch_size=16, resolution=(48, 64))
    with pytest.raises(RecipeError, match=f"^upsampler: .*{message}"):
        base_resolution(recipe, spec)


def test_the_dry_run_prints_the_resolved_recipe_and_makes_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_upsampler", str(recipe), "--dry-run", "run.seed=7"])
    main()
    printed = capsys.readouterr().out
    assert "seed: 7" in printed
    assert "num_views: 5" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"teacher": TEACHER | {"upsampler": {"kind": "tile", "factor": 2}}},
            "teacher.upsampler: this run trains it; remove the key",
        ),
        (
            {"upsampler": "some/file.safetensors"},
            "upsampler: is trained already; give another kind",
        ),
        ({"engine": {"precision": "fp16"}}, "engine.precision: fp16 would round PHI-S"),
        ({"upsampler": {"kind": "featsharpp", "factor": 2}}, "did you mean 'featsharp'"),
        ({"upsampler": {"kind": "featsharp"}}, "upsampler.*factor: required"),
        ({"schedule": {"warmup_steps": 10}}, "warmup_steps: 10 must be less than the run's 10"),
        ({"views": {"num_view": 3}}, r"views\.num_view: .*num_views"),
        ({"task": "student"}, "task"),
    ],
)
def test_a_wrong_recipe_is_refused_in_words(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_upsampler_recipe(write(tmp_path, tmp_path, **sections), [])
