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
from pathlib import Path
from typing import Any

from distill.checkpoint import checkpoint_name, is_whole
from distill.config import dump_yaml
from distill.evaluation.resolution_sweep import largest_drop
from tests.quality.ablate_targets import run
from tests.quality.compare_upsamplers import REPOSITORY, photographs, write_photographs

RECIPE = REPOSITORY / "recipes" / "two_arms.yaml"
STEPS = 350
TRAINED = {"low": 128, "high": 256}  # px of each arm
SIZES = (64, 96, 128, 192, 256, 384, 512)
TEACHERS = {"clip": "CLIP", "siglip": "SigLIP"}
STUDENTS = {  # the teachers of each arm
    "split": {"low": ["clip"], "high": ["siglip"]},
    "both": {"low": ["clip", "siglip"], "high": ["clip", "siglip"]},
}
LOOKS = {
    "split": ("#d1495b", "CLIP at 128 px, SigLIP at 256 px"),
    "both": ("#00798c", "each teacher at each size"),
}
BUDGET = (
    f"run.steps={STEPS}",
    *(f"arms.{arm}.resolution={size}" for arm, size in TRAINED.items()),
    "arms.low.batch_size=8",
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
    data = f"data.sources=[{{shards: {shards}}}]"
    for name in STUDENTS:
        if not is_whole(out / name / "checkpoints" / checkpoint_name(STEPS)):
            where = (f"run.dir={out / name}", data)
            run("distill.train_student", str(RECIPE), *where, *overrides(name))
    curves = measure(out)
    report(curves)
    draw(curves, out / "mode_switch.png")
    return 0


def overrides(name: str) -> list[str]:
    """What a student changes in the recipe."""
    arms = STUDENTS[name].items()
    return [*BUDGET, *(f"arms.{arm}.teachers=[{','.join(seen)}]" for arm, seen in arms)]


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
                shown = "  ".join(f"{value:.3f}" for value in values)
                drop = f"largest drop {largest_drop(values):.3f}"
                print(f"{name:6s} {teacher:7s} {key:15s} {shown}   {drop}")


def draw(curves: Curves, path: Path) -> None:
    """A panel a teacher, a line a student; full points where it was trained on that teacher."""
    # Without pyplot there is no window and no global state.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 3.7), layout="constrained")
    panels = figure.subplots(1, len(TEACHERS), sharex=True, sharey=True)
    for axis, (teacher, title) in zip(panels, TEACHERS.items(), strict=True):
        for size in TRAINED.values():
            axis.axvline(size, color="0.93", linewidth=14, zorder=0)
        for name, (colour, _) in LOOKS.items():
            seen = {TRAINED[arm] for arm, teachers in STUDENTS[name].items() if teacher in teachers}
            values = [point["spatial_cosine"] for point in curves[name][teacher]]
            axis.plot(SIZES, values, "o-", color=colour, linewidth=2, markerfacecolor="white")
            for size, value in zip(SIZES, values, strict=True):
                if size in seen:
                    axis.plot(size, value, "o", color=colour, markersize=9)
        axis.set(title=title, xlabel="student's images, px", xscale="log")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean cosine to the teacher's map")
    handles = [Line2D([], [], color=colour, linewidth=2) for colour, _ in LOOKS.values()]
    labels = [f"{name}: {words}" for name, (_, words) in LOOKS.items()]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
