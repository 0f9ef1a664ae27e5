"""Mode switching in miniature: each teacher at one image size, or each at both.

    python -m tests.quality.mode_switch --photographs OUT/upsamplers/photographs-256px \
        --start OUT/low --out OUT/mode_switch

OUT is that of `ablate_targets`. Both students start from its first stage, which was trained on CLIP
at 128 px only. They train with `recipes/two_arms.yaml`, on the same images at the same sizes in
every step. `split` trains as AM-RADIO and RADIOv2.1 do, `both` as RADIOv2.5 does (arXiv 2412.07679,
section 4.1). Teachers get their native size, and the student's map of a larger image is shrunk to
theirs, so that the targets are the same. Finished stages are skipped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.evaluation.resolution_sweep import largest_drop
from distill.runtime.checkpoint import checkpoint_name, find_checkpoint, is_complete
from distill.runtime.config import dump_yaml
from tests.quality.ablate_targets import run
from tests.quality.compare_upsamplers import REPOSITORY

RECIPE = REPOSITORY / "recipes" / "two_arms.yaml"
STEPS = 120
TRAINED = {"low": 128, "high": 256}  # px of each arm
SIZES = (64, 96, 128, 192, 256, 384, 512)
TEACHERS = {"clip": "CLIP", "siglip": "SigLIP"}
STUDENTS = {  # the teachers of each arm
    "split": {"low": ["clip"], "high": ["siglip"]},
    "both": {"low": ["clip", "siglip"], "high": ["clip", "siglip"]},
}
LOOKS = {
    "start": ("#9a9a9a", "CLIP at 128 px only"),
    "split": ("#d1495b", "CLIP at 128 px, SigLIP at 256 px"),
    "both": ("#00798c", "each teacher at each size"),
}
FIGURES = {"spatial_cosine": "maps", "summary_cosine": "summaries"}
BUDGET = (
    f"run.steps={STEPS}",
    *(f"arms.{arm}.resolution={size}" for arm, size in TRAINED.items()),
    *(f"arms.{arm}.batch_size=6" for arm in TRAINED),
    "teachers.clip.upsampler=null",
    "student.final_norm=true",  # as the start has
    "optimizer.lr=6.0e-4",
    "schedule.warmup_steps=10",
    "engine.precision=auto",
    "targets.precision=auto",
    "evaluation=null",
)
Curves = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # student to teacher to points


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality.mode_switch")
    parser.add_argument("--photographs", type=Path, required=True, help="with train and held-out")
    parser.add_argument("--start", type=Path, required=True, help="run of the first stage")
    parser.add_argument("--out", type=Path, required=True, help="folder for all outputs")
    options = parser.parse_args()
    photographs, start, out = (
        path.resolve() for path in (options.photographs, options.start, options.out)
    )
    first = find_checkpoint(start) / "student.safetensors"
    for name in STUDENTS:
        if not is_complete(out / name / "checkpoints" / checkpoint_name(STEPS)):
            data = f"data.sources=[{{shards: {photographs / 'train'}}}]"
            where = (
                f"run.dir={out / name}",
                data,
                f"student.init={{kind: student, path: {first}}}",
            )
            run("distill.train_student", str(RECIPE), *where, *overrides(name))
    curves = measure(photographs / "held-out", start, out)
    report(curves)
    draw(curves, out / "mode_switch.png")
    return 0


def overrides(name: str) -> list[str]:
    """The overrides of a student."""
    arms = STUDENTS[name].items()
    return [*BUDGET, *(f"arms.{arm}.teachers=[{','.join(seen)}]" for arm, seen in arms)]


def measure(images: Path, start: Path, out: Path) -> Curves:
    """Evaluates the start and both students at all sizes."""
    runs = {"start": start, **{name: out / name for name in STUDENTS}}
    sweep = {"kind": "resolution_sweep", "images": str(images), "resolutions": list(SIZES)}
    suite = {
        "task": "benchmarks",
        "dir": str(out / "sweep"),
        "models": {name: {"kind": "student", "path": str(path)} for name, path in runs.items()},
        "benchmarks": {"resolution": sweep},
    }
    path = out / "sweep.yaml"
    path.write_text(dump_yaml(suite))
    run("distill.evaluate", str(path))
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in runs}
    for name, of_teacher in curves.items():
        file = out / "sweep" / "resolution" / name / "seed-0" / "curves.jsonl"
        for line in file.read_text().splitlines():
            point = json.loads(line)
            of_teacher.setdefault(point["teacher"], []).append(point)
    return curves


def report(curves: Curves) -> None:
    """Prints the curves, and their largest drop between neighbouring sizes."""
    for name, of_teacher in curves.items():
        for teacher, points in of_teacher.items():
            for key, of_what in FIGURES.items():
                values = [point[key] for point in points]
                shown = "  ".join(f"{value:.3f}" for value in values)
                drop = f"largest drop {largest_drop(values):.3f}"
                print(f"{name:6s} {teacher:7s} {of_what:9s} {shown}   {drop}")


def draw(curves: Curves, path: Path) -> None:
    """Draws a column for each teacher and a line for each student.

    Points are filled at sizes that the student was trained on with that teacher.
    """
    # Not pyplot, which has global state and may open windows.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(len(FIGURES), len(TEACHERS), sharex=True, sharey="row")
    for row, (key, of_what) in zip(panels, FIGURES.items(), strict=True):
        row[0].set_ylabel(f"cosine of {of_what}")
        for axis, teacher in zip(row, TEACHERS, strict=True):
            _panel(
                axis, {n: of[teacher] for n, of in curves.items() if teacher in of}, teacher, key
            )
    for axis, title in zip(panels[0], TEACHERS.values(), strict=True):
        axis.set_title(title)
    for axis in panels[-1]:
        axis.set(xlabel="student's images, px", xscale="log")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
    handles = [Line2D([], [], color=colour, linewidth=2) for colour, _ in LOOKS.values()]
    labels = [f"{name}: {words}" for name, (_, words) in LOOKS.items()]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=90)


def seen(name: str, teacher: str) -> set[int]:
    """The image sizes at which a student was trained on a teacher."""
    if name == "start":
        return {TRAINED["low"]}
    return {TRAINED[arm] for arm, teachers in STUDENTS[name].items() if teacher in teachers}


def _panel(
    axis: Any, lines: Mapping[str, Sequence[Mapping[str, Any]]], teacher: str, key: str
) -> None:
    for size in TRAINED.values():
        axis.axvline(size, color="0.93", linewidth=14, zorder=0)
    for name, points in lines.items():
        colour, values = LOOKS[name][0], [point[key] for point in points]
        axis.plot(SIZES, values, "o-", color=colour, linewidth=2, markerfacecolor="white")
        for size, value in zip(SIZES, values, strict=True):
            if size in seen(name, teacher):
                axis.plot(size, value, "o", color=colour, markersize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
