"""Mode switching in miniature: teachers that see one size each, beside teachers that see both.

    python -m tests.quality.mode_switch --data ../shared/data --out OUT

Both students are `recipes/two_arms.yaml` on photographs, with the same images at the same sizes in
every step. `split` is AM-RADIO's and RADIOv2.1's way, `both` RADIOv2.5's (arXiv 2412.07679, section
4.1; ../shared/reference/radio-training.md 3.2). Teachers see their native size, and the student's
map of a large image is shrunk to theirs, so that the targets of a curve are the same at all sizes
from there on. What is finished is not done again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill.checkpoint import checkpoint_name, is_whole
from distill.config import dump_yaml
from tests.quality.ablate_targets import run
from tests.quality.compare_upsamplers import REPOSITORY, photographs, write_photographs

STEPS = 350
LOW, HIGH = 128, 256  # px that the student is trained at
SIZES = (64, 96, 128, 192, 256, 384, 512)
TEACHERS = {"clip": "CLIP", "siglip": "SigLIP"}
STUDENTS = {
    "split": ("arms.low.teachers=[clip]", "arms.high.teachers=[siglip]"),
    "both": ("arms.low.teachers=null", "arms.high.teachers=null"),
}
BUDGET = (
    f"run.steps={STEPS}",
    f"arms.low.resolution={LOW}",
    "arms.low.batch_size=8",
    f"arms.high.resolution={HIGH}",
    "arms.high.batch_size=4",
    "teachers.clip.upsampler=null",
    "engine.precision=bf16",
    "targets.precision=bf16",
    "evaluation=null",
)
Curves = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # student to teacher to points


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality.mode_switch")
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="for everything that is made")
    options = parser.parse_args()
    out = options.out.resolve()
    write_photographs(options.data, out, factor=2)
    shards = photographs(out, factor=2) / "train"
    for name, teachers in STUDENTS.items():
        if not is_whole(out / name / "checkpoints" / checkpoint_name(STEPS)):
            recipe = str(REPOSITORY / "recipes" / "two_arms.yaml")
            data = f"data.sources=[{{shards: {shards}}}]"
            run("distill.train_student", recipe, f"run.dir={out / name}", data, *BUDGET, *teachers)
    curves = measure(out)
    report(curves)
    draw(curves, out / "mode_switch.png")
    return 0


def measure(out: Path) -> Curves:
    """Both students at all sizes."""
    sweep = {
        "kind": "resolution_sweep",
        "images": str(photographs(out, factor=2) / "held-out"),
        "resolutions": list(SIZES),
    }
    suite = {
        "task": "benchmarks",
        "dir": str(out / "sweep"),
        "models": {name: {"kind": "student", "path": str(out / name)} for name in STUDENTS},
        "benchmarks": {"resolution": sweep},
    }
    path = out / "sweep.yaml"
    path.write_text(dump_yaml(suite))
    run("distill.evaluate", str(path))
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in STUDENTS:
        curves[name] = {teacher: [] for teacher in TEACHERS}
        file = out / "sweep" / "resolution" / name / "seed-0" / "curves.jsonl"
        for line in file.read_text().splitlines():
            point = json.loads(line)
            curves[name][point["teacher"]].append(point)
    return curves


def report(curves: Curves) -> None:
    """Prints the curves, and their largest fall between neighbours."""
    for name, teachers in curves.items():
        for teacher, points in teachers.items():
            for key in ("spatial_cosine", "summary_cosine"):
                values = [point[key] for point in points]
                fall = max(one - other for one, other in pairwise(values))
                shown = "  ".join(f"{value:.3f}" for value in values)
                print(f"{name:6s} {teacher:7s} {key:15s} {shown}   largest drop {fall:.3f}")


def draw(curves: Curves, path: Path) -> None:
    """Both students beside each other, a panel a teacher."""
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    looks = {"split": ("#d1495b", "o--", "one size each"), "both": ("#00798c", "o-", "both sizes")}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(TEACHERS), sharey=True)
    for axis, (teacher, title) in zip(panels, TEACHERS.items(), strict=True):
        for name, (colour, style, label) in looks.items():
            values = [point["spatial_cosine"] for point in curves[name][teacher]]
            axis.plot(SIZES, values, style, color=colour, label=label)
        axis.set(title=title, xlabel="the student's images, px", xscale="log")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
