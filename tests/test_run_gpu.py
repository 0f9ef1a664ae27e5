"""Whole runs on a GPU, as a user starts them; `pytest -m gpu`."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.runtime.tracking import read_metrics
from tests import test_run_upsampler
from tests.tiny_run import (
    DEADLOCK_S,
    STEPS,
    environment,
    launcher_command,
    plain_command,
    run,
    write_recipe,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.process,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(folder: Path) -> list[float]:
    return [float(line["loss"]) for line in read_metrics(folder / "run")]


def test_the_first_steps_are_those_of_a_cpu(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"steps": 3}, engine={"precision": "fp32"})
    command = plain_command(recipe, f"run.dir={tmp_path / 'gpu' / 'run'}")
    assert run(command, tmp_path, fresh=True).returncode == 0
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run(plain_command(recipe), cwd=tmp_path, env=hidden, check=True, timeout=DEADLOCK_S)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path), rel=1e-3)


def test_a_compiled_run_in_bfloat16_learns_and_resumes(tmp_path: Path) -> None:
    targets = {"precision": "bf16", "compile": True}
    recipe = write_recipe(tmp_path, engine={"precision": "bf16"}, targets=targets)
    first = run(launcher_command(recipe, f"run.steps={STEPS // 2}", ranks=1), tmp_path)
    assert first.returncode == 0, first.stderr
    second = run(launcher_command(recipe, ranks=1), tmp_path)
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stderr + second.stdout
    came = losses(tmp_path)
    assert len(came) == STEPS
    assert came[-1] < came[0]


def test_an_upsampler_trains_in_bfloat16(tmp_path: Path) -> None:
    targets = {"precision": "bf16"}
    recipe = test_run_upsampler.write(tmp_path, engine={"precision": "bf16"}, targets=targets)
    command = launcher_command(recipe, ranks=1)
    command[command.index("distill.train_student")] = "distill.train_upsampler"
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / test_run_upsampler.LAST)
    assert all(value.isfinite().all() for value in weights.values())
