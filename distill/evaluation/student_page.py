"""Writes the page of a student's run: agreement with its teachers, feature maps and losses."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_text
from distill.display.pages import Picture, render
from distill.display.tables import Cell
from distill.display.text import chart_text
from distill.runtime.tracking import read_metrics
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.trained import Trained

_METRICS = {
    "fidelity": "fidelity",
    "spatial_cosine": "spatial cosine",
    "summary_cosine": "summary cosine",
}


def write_page(
    trained: Trained, rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Path]
) -> Path:
    """Writes `page/index.html` into the run's folder, with its pictures inside; returns its path.

    Args:
        trained: the run.
        rows: those of `fidelity.jsonl`.
        panels: PNG files of feature maps by the size of the student's input, `256 x 256 px`.
    """
    recipe = trained.recipe
    page = render(
        "student_run.html.jinja",
        title=trained.run.absolute().name,
        teachers=", ".join(f"{n} ({c.kind})" for n, c in recipe.teachers.items()),
        step=trained.step,
        images=_images(recipe),
        checkpoint=trained.checkpoint,
        students=list(dict.fromkeys(row["student"] for row in rows)),
        agreement=_agreement(rows),
        panels={
            size: Picture(
                path.read_bytes(),
                f"Feature maps at {size}: for each image its teachers' and the students'",
            )
            for size, path in panels.items()
        },
        losses=_losses(trained.run),
    )
    path = trained.run / "page" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _images(recipe: StudentRecipe) -> str:
    """The images of a step: `64 images at 256 x 256 or 432 x 432 px and 8 images at ...`."""
    arms = []
    for arm in recipe.placed_arms.values():
        sizes = " or ".join(f"{s.size[0]} x {s.size[1]}" for s in arm.resolution.root)
        arms.append(f"{arm.batch_size} images at {sizes} px")
    return " and ".join(arms)


def _agreement(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[tuple[str, list[Cell]]]]:
    """Rows by teacher and resolution: the name of a metric and a cell for each student.

    The students stand side by side, so that the three columns fit the screen of a telephone.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        height, width = row["resolution"]
        place = f"{row['teacher']}, {height} x {width} px"
        groups.setdefault(place, {})[row["student"]] = row
    return {
        place: [
            (name, [Cell(f"{value:.3f}", value == max(values)) for value in values])
            for key, name in _METRICS.items()
            if None not in (values := [row[key] for row in group.values()])
        ]
        for place, group in groups.items()
    }


def _losses(run: Path) -> Picture | None:
    """Curves of the losses; None if the run has written no metrics."""
    lines = [line for line in read_metrics(run) if "loss" in line]
    if not lines:
        return None
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    total, parts = figure.subplots(1, 2)
    for name in [key for key in lines[0] if key == "loss" or key.startswith("loss/")]:
        axes = total if name == "loss" else parts
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(
            *zip(*points, strict=True), marker=".", label=chart_text(name.removeprefix("loss/"))
        )
    for axes, title in ((total, "total loss"), (parts, "loss of each teacher, unweighted")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    parts.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    first, last = lines[0], lines[-1]
    return Picture(
        buffer.getvalue(),
        f"Curves of the losses; the total goes from {first['loss']:.3f} at step {first['step']} "
        f"to {last['loss']:.3f} at step {last['step']}",
    )
