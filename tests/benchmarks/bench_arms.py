"""CPU time of a step with two arms and three teachers, compared with a bare PyTorch loop.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_arms

A ViT-S/16 student sees four images of 224 px and one of 448 px. Three ViT-S/16 teachers with random
weights see the large one by different routes: in four tiles, at their own size, at the size of the
student. Target: at most 1.05 times the CPU time of the bare loop.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.figure import Figure
from tests.benchmarks.one_step import (
    Arm,
    as_they_are,
    bare_step,
    cpu_ratio,
    in_tiles,
    our_step,
    shrunk,
)
from tests.benchmarks.workload import SIDE, recipe

MODEL = "vit_small_patch16_224"
ARMS = {
    "low": Arm(4, SIDE, (as_they_are, as_they_are, as_they_are)),
    "high": Arm(1, 2 * SIDE, (in_tiles, shrunk, as_they_are)),
}


def tree() -> dict[str, Any]:
    """The recipe of that step."""
    teacher = {"kind": "timm", "model": MODEL, "weights": "none"}
    teachers = {
        "tiled": teacher | {"upsampler": {"kind": "tile", "factor": 2}},
        "shrunk": teacher,
        "matched": teacher | {"resolution": [SIDE, SIDE]},
    }
    arms = {n: {"resolution": arm.side, "batch_size": arm.images} for n, arm in ARMS.items()}
    run = {"resolution": None, "batch_size": None}
    student = {"max_resolution": 2 * SIDE}
    return recipe(Path("unused"), steps=1, teachers=teachers, arms=arms, run=run, student=student)


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arms = list(ARMS.values())
    steps = {"ours": our_step(tree()), "bare": bare_step(MODEL, arms)}
    ratio = cpu_ratio(steps, [arm.batch() for arm in arms], chosen.rounds)
    return [Figure("arms: CPU time over a bare PyTorch loop", ratio, 1.05, True)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
