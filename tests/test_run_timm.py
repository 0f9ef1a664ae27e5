"""Whole runs of a student that is a network of timm with batch norms."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import student
from distill.runtime.checkpoint import find_checkpoints
from distill.runtime.tracking import read_metrics
from tests.tiny_run import assert_same_weights, plain_command, run, write_images, write_recipe

pytestmark = pytest.mark.process

STEPS = 4
RESNET = ("student.kind=timm", "student.model=test_resnet")
FINISHED = "distill.train_student"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one and of two ranks, with a moving average; switched by overrides."""
    folder = tmp_path_factory.mktemp("timm")
    recipe = write_recipe(folder, run={"steps": STEPS, "resolution": 64}, checkpoint={"every": 2})
    for ranks, options in ((1, ()), (2, ("engine.zero_stage=3",))):
        command = plain_command(recipe, *RESNET, f"run.dir=run{ranks}", *options)
        done = run(command, folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "the recipe's width, depth, heads, max_resolution under student" in done.stderr
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_checkpoint_holds_the_student_with_its_statistics(finished: Path, ranks: int) -> None:
    newest = find_checkpoints(finished / f"run{ranks}/checkpoints")[0]
    model = student.load(newest / "student.safetensors")
    norms = [m for m in model.trunk.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean.abs().max() > 0
        assert norm.running_mean.isfinite().all()
        assert int(norm.num_batches_tracked) == STEPS
    assert model.config.head.upsample == {"expert": 2}
    assert (newest / "batch_norms.pt").is_file()


def test_a_run_that_goes_on_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run1", tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/step-{STEPS:08d}")
    command = plain_command(finished / "recipe.yaml", *RESNET, f"run.dir={tmp_path / 'run'}")
    done = run(command, finished)
    assert done.returncode == 0, done.stderr
    assert_same_weights(finished / "run1", tmp_path / "run", STEPS)


def test_evaluation_and_pictures_take_it(finished: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "held-out", count=2)
    entry = f"evaluation={{images: {tmp_path / 'held-out'}, resolutions: [64, [32, 96]]}}"
    command = plain_command(finished / "run1", entry)
    command[command.index(FINISHED)] = "distill.evaluate"
    done = run(command, finished)
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line)
        for line in (finished / "run1/evaluation/fidelity.jsonl").read_text().splitlines()
    ]
    assert {tuple(row["resolution"]) for row in rows} == {(64, 64), (32, 96)}


def test_a_frozen_network_learns_a_new_head_and_keeps_its_old_outputs(
    finished: Path, tmp_path: Path
) -> None:
    newest = find_checkpoints(finished / "run1/checkpoints")[0] / "student.safetensors"
    expert = "{kind: timm, model: test_vit, weights: none, resolution: [32, 32]}"
    done = run(
        plain_command(
            finished / "recipe.yaml",
            *RESNET,
            f"run.dir={tmp_path / 'run'}",
            f"student.init={{kind: student, path: {newest}}}",
            f"teachers.new={expert}",
            "objective.weights.expert={spatial: 0, summary: 0}",
            "finetuning.trunk=frozen",
            "run.steps=2",
        ),
        finished,
    )
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[-1]["loss/new/spatial"] > 0
    old = student.load(newest)
    tuned = student.load(tmp_path / "run/checkpoints/step-00000002/student.safetensors")
    images = torch.rand(2, 3, 64, 96)
    before, after = old(images), tuned(images)
    assert torch.equal(before.backbone.spatial, after.backbone.spatial)
    assert torch.equal(before.heads["expert"].spatial, after.heads["expert"].spatial)
    assert "new" in after.heads
