"""Table 2 of the FeatSharp paper (arXiv 2502.16025) in miniature: a student for each upsampler.

    python -m tests.quality.ablate_targets --data DATA --out OUT

Trains the upsamplers (`compare_upsamplers`), a student at 128 px that all others start from, then
recipes/cpu_ablation.yaml for every row and seed, and evaluates all of them on labelled data.
Finished stages are skipped. Rows of one seed are trained on the same images in the same order.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distill.runtime.checkpoint import checkpoint_name, is_complete
from distill.runtime.config import dump_yaml, load_yaml
from tests.quality.compare_upsamplers import REPOSITORY

LEARNED = ("featup", "featsharp")
ROWS = ("baseline", "tile", "s2", *LEARNED)
LOW, HIGH, UPSAMPLER = 2500, 300, 150  # steps
BENCHMARKS = {"camvid": "camvid", "depth_quick": "nyuv2", "knn": "det200"}  # recipe to data
GROUPS = {"segmentation": ["camvid"], "depth": ["depth"], "classification": ["knn"]}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality.ablate_targets")
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for all outputs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    options.data, options.out = options.data.resolve(), options.out.resolve()
    seeds = [str(seed) for seed in options.seeds]
    compare = ["--data", str(options.data), "--out", str(options.out / "upsamplers")]
    compare += ["--batch", "4", "--methods", *LEARNED, "--seeds", *seeds]
    run("tests.quality.compare_upsamplers", *compare)
    low = ["run.resolution=128", "run.batch_size=32", f"run.steps={LOW}", "student.init=null"]
    low += ["optimizer.lr=1.0e-3", "checkpoint.every=500"]
    train(options, "low", LOW, *low)
    for seed in options.seeds:
        for row in ROWS:
            train(options, f"{row}-{seed}", HIGH, f"run.seed={seed}", *targets(options, row, seed))
        measure(options, seed)
    report(options)
    return 0


def run(module: str, *arguments: str) -> None:
    """Runs a command of the project on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=REPOSITORY, env=environment, check=True
    )


def train(options: argparse.Namespace, name: str, steps: int, *overrides: str) -> None:
    """Trains one student, unless it exists."""
    folder = options.out / name
    if is_complete(folder / "checkpoints" / checkpoint_name(steps)):
        return
    start = options.out / "low" / "checkpoints" / checkpoint_name(LOW) / "student.safetensors"
    shards = options.out / "upsamplers" / "photographs-256px" / "train"
    run(
        "distill.train_student",
        *(str(REPOSITORY / "recipes" / "cpu_ablation.yaml"), f"run.dir={folder}"),
        *(f"data.sources=[{{shards: {shards}}}]", f"student.init.path={start}", *overrides),
    )


def targets(options: argparse.Namespace, row: str, seed: int) -> list[str]:
    """The overrides of a row."""
    if row == "baseline":
        return []
    upsampler = f"{{kind: {row}, factor: 2}}"
    if row in LEARNED:
        trained = options.out / "upsamplers" / f"clip-2x-{UPSAMPLER}x4" / f"seed{seed}"
        path = trained / "checkpoints" / checkpoint_name(UPSAMPLER) / f"{row}.safetensors"
        upsampler = str(path)
    return [f"teachers.clip.upsampler={upsampler}"]


def measure(options: argparse.Namespace, seed: int) -> None:
    """Evaluates the students of a seed on all benchmarks, with the same seed."""
    folder = options.out / "benchmarks" / f"seed{seed}"
    suite: dict[str, Any] = {"task": "benchmarks", "dir": str(folder), "seeds": [seed]}
    students = {row: f"{row}-{seed}" for row in ROWS}
    if seed == options.seeds[0]:  # all seeds have the same start
        students["start"] = "low"
    suite["models"] = {
        name: {"kind": "student", "path": str(options.out / path), "resolution": [256, 256]}
        for name, path in students.items()
    }
    suite["benchmarks"] = {}
    for recipe, data in BENCHMARKS.items():
        entries = load_yaml(REPOSITORY / "recipes" / "evaluation" / f"{recipe}.yaml")["benchmarks"]
        for name, entry in entries.items():
            entry["dataset"]["root"] = str(options.data / data)
            if "input" in entry:
                entry["input"] = {"size": [384, 512]}
            suite["benchmarks"][name] = entry
    evaluate(folder, suite)


def report(options: argparse.Namespace) -> None:
    """Writes means and deviations over seeds, changes against the baseline, and pictures."""
    folders = [str(options.out / "benchmarks" / f"seed{seed}") for seed in options.seeds]
    folder = options.out / "report"
    page = {"task": "report", "dir": str(folder), "results": folders, "baseline": "baseline"}
    evaluate(folder, page | {"groups": GROUPS, "may_differ": ["encoder.path", "fingerprint"]})


def evaluate(folder: Path, recipe: dict[str, Any]) -> None:
    """Runs `distill.evaluate` on a recipe, which is written beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(dump_yaml(recipe))
    run("distill.evaluate", str(path))


if __name__ == "__main__":
    sys.exit(main())
