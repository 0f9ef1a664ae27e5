"""A run small enough for tests: smooth random images, one random teacher, a two-block student."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from data.write_shards import main as write_shards
from distill.runtime.config import dump_yaml
from tests.forks import Fork

# No outcome may depend on how fast a machine is: this ends only what would never end.
DEADLOCK_S = 900
STEPS = 24
REPOSITORY = Path(__file__).resolve().parent.parent
_ATTEMPTS = itertools.count()


def write_images(folder: Path, count: int = 24, size: tuple[int, int] = (80, 96)) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def tiny_recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe over shards in `folder`, which are written at first use."""
    if not (folder / "shards").exists():
        write_images(folder / "images")
        assert write_shards([str(folder / "images"), str(folder / "shards")]) == 0
    recipe: dict[str, Any] = {
        "task": "student",
        "run": {"dir": str(folder / "run"), "steps": STEPS, "resolution": 32, "batch_size": 4},
        "data": {"sources": [{"shards": str(folder / "shards")}], "workers": 0},
        "teachers": {
            "expert": {
                "kind": "timm",
                "model": "test_vit",
                "weights": "none",
                "resolution": [32, 32],
            }
        },
        "student": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "max_resolution": 64,
            "head": {"hidden_dim": 16, "num_layers": 1},
        },
        "targets": {"statistics_images": 16},
        "engine": {"zero_stage": 2, "ema_decay": 0.9},
        "checkpoint": {"every": 8},
        "tracking": {"every": 1},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    return recipe


def write_recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(tiny_recipe(folder, **sections)))
    return path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATH": path}
    return {**os.environ, **ours}


def plain_command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "distill.train_student", str(recipe), *overrides]


def launcher_command(recipe: Path, *overrides: str, ranks: int) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    return [*launcher, "--module", "distill.train_student", str(recipe), *overrides]


def run(
    command: list[str], folder: Path, *, ranks: int = 1, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; `python -m MODULE ...` is forked, see `forks`.

    Args:
        command: as a user types it.
        folder: the current directory.
        ranks: how many processes run it together, with the variables that torchrun sets.
        fresh: starts a fresh interpreter, as a user does.
    """
    if fresh or command[:2] != [sys.executable, "-m"]:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=DEADLOCK_S,
            check=False,
        )
    forks = [Fork(command, folder, environment() | rank) for rank in _variables_of(ranks)]
    try:
        codes = [fork.wait(DEADLOCK_S) for fork in forks]
    finally:
        for fork in forks:
            fork.kill()
    stdout, stderr = ("".join(texts) for texts in zip(*(f.outputs() for f in forks), strict=True))
    return subprocess.CompletedProcess(command, max(codes, key=abs), stdout, stderr)


def _variables_of(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank; the number of the attempt names the file they meet in."""
    if ranks == 1:
        return [{}]
    attempt, size = str(next(_ATTEMPTS)), str(ranks)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RESTART_COUNT": attempt}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    """The checkpoints of a step in two run folders hold the same bits."""
    name = f"checkpoints/step-{step:08d}/student.safetensors"
    expected, came = load_file(one / name), load_file(other / name)
    assert expected.keys() == came.keys()
    for key, value in expected.items():
        assert torch.equal(value, came[key]), key


def run_until_killed(command: list[str], folder: Path, at: str) -> None:
    """Runs `python -m MODULE ...` until it touches a path that contains the text `at`."""
    assert Fork(command, folder, environment(), killed_at=at).wait(DEADLOCK_S) == -signal.SIGKILL


def start(command: list[str], folder: Path) -> "Fork | subprocess.Popen[bytes]":
    """Starts a command; `python -m MODULE ...` is forked, see `forks`."""
    if command[:2] == [sys.executable, "-m"]:
        return Fork(command, folder, environment())
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


# A user's own teacher, found in the current directory; `trouble` is run before each batch.
_TROUBLED = """
import os
import resource
import time
from pathlib import Path

from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher

class Troubled(Teacher):
    def __init__(self, config):
        spec = FeatureSpec(summary_dim=None, spatial_dim=3, patch_size=16, resolution=(32, 32))
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))

    def extract(self, images):
        trouble()
        return Features(None, images.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)))
"""


def write_troubled(folder: Path, trouble: str, **sections: Any) -> Path:
    """A recipe whose teacher, a user's own, calls `trouble` before each batch.

    Args:
        folder: where the command runs.
        trouble: Python code that defines it; os, resource, time and Path are imported.
        sections: of the recipe, see `write_recipe`.
    """
    (folder / "troubled.py").write_text(_TROUBLED + trouble)
    teachers = {"expert": {"kind": "troubled:Troubled"}}
    return write_recipe(folder, teachers=teachers, **sections)


def wait_for_metrics(
    run_folder: Path, process: "Fork | subprocess.Popen[bytes] | subprocess.Popen[str]"
) -> None:
    """Until the run has written a line more than it had, or has ended."""
    path = run_folder / "metrics.jsonl"
    before = path.read_bytes() if path.exists() else b""
    deadline = time.monotonic() + DEADLOCK_S
    while process.poll() is None:
        if path.exists() and path.read_bytes() != before:
            return
        assert time.monotonic() < deadline, "the run writes no metrics"
        time.sleep(0.02)
