"""Whole runs with every option of objective and student on: resumed, on two ranks, fine-tuned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import student as student_package
from distill.runtime.tracking import read_metrics
from tests.tiny_run import (
    assert_same_weights,
    plain_command,
    run,
    run_until_killed,
    write_recipe,
)

pytestmark = pytest.mark.process

STEPS = 12
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
    "student": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "max_resolution": 64,
        "head": {"hidden_dim": 16, "attention_blocks": 1, "attention_heads": 4},
        "position_dropout": 0.1,
        "windows": {"num_global": 1},
    },
    "reparametrisation": {"spectral": "all", "damp": 0.05},
    "window_augmentation": {"probability": 0.5, "sizes": [1]},
    "run": {"steps": STEPS},
    "tracking": {"every": 1, "pictures_every": 6},
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
    run_until_killed(plain_command(recipe), tmp_path, at=".tmp-step-00000012")
    assert len(read_metrics(tmp_path / "run")) == STEPS
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


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_train_under_zero_1_and_2(stage: int, finished: Path, tmp_path: Path) -> None:
    recipe = beside(finished, tmp_path)
    done = run(plain_command(recipe, f"engine.zero_stage={stage}"), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[-1]["loss/mesa"] > 0


@pytest.mark.parametrize("trunk", ["frozen", "low_rank"])
def test_a_student_learns_one_more_teacher_and_keeps_the_others(
    trunk: str, finished: Path, tmp_path: Path
) -> None:
    """With the old teachers silent: their heads, and a frozen trunk, are the same bits after."""
    before = finished / f"run/checkpoints/step-{STEPS:08d}/student.safetensors"
    silent = {"summary": 0, "spatial": 0}
    student = {
        **SECTIONS["student"],
        "init": {"kind": "student", "path": str(before)},
        "isolated": ["new"],
    }
    recipe = write_recipe(
        tmp_path,
        data={"sources": [{"shards": str(finished / "shards")}]},
        teachers={**SECTIONS["teachers"], "new": {**EXPERT, "model": "test_vit3"}},
        student=student,
        objective={"weights": {"expert": silent, "other": silent}},
        finetuning={"trunk": trunk, "rank": 2},
        run={"steps": STEPS},
    )
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["loss/new/spatial"] < metrics[0]["loss/new/spatial"]
    after = tmp_path / f"run/checkpoints/step-{STEPS:08d}/student.safetensors"
    old, new = load_file(before), load_file(after)
    tokens = "trunk.embedding.class_tokens"
    moved = {n for n, value in old.items() if n != tokens and not torch.equal(value, new[n])}
    layers = {f"trunk.blocks.{i}.{part}.weight" for i in range(2) for part in PARTS}
    assert moved == (layers if trunk == "low_rank" else set())
    assert torch.equal(old[tokens], new[tokens][:2])
    images = torch.rand(2, 3, 32, 48)
    was, now = student_package.load(before)(images), student_package.load(after)(images)
    drift = (was.heads["expert"].spatial - now.heads["expert"].spatial).abs().max()
    assert drift < 1e-5 if trunk == "frozen" else drift > 1e-5


PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_arms_on_ranks_of_their_own_train_as_one_process_does(
    finished: Path, tmp_path: Path
) -> None:
    """Shifts, noise, windows, dropping, balancing and MESA draw and weigh alike on any ranks.

    Not so power iteration, which goes on by one step a pass.
    """
    sections = {
        **SECTIONS,
        "data": {"sources": [{"shards": str(finished / "shards")}]},
        "run": {"steps": 6, "resolution": None, "batch_size": None},
        "reparametrisation": {"damp": 0.05},
        "arms": {
            "low": {"resolution": 32, "batch_size": 4, "micro_batch_size": 2, "ranks": 1},
            "high": {
                **{"resolution": [48, 64], "batch_size": 4, "micro_batch_size": 2, "ranks": 1},
                "teachers": ["expert"],
            },
        },
    }
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        recipe = write_recipe(folder, **sections)
        done = run(plain_command(recipe), folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(read_metrics(folder / "run"))
    for one, two in zip(*found, strict=True):
        names = {name for name in one if "loss/" in name} | {"loss", "grad_norm"}
        assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4)
    assert found[1][-1]["loss/mesa"] > 0


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
