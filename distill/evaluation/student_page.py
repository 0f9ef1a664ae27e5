"""Writes the page of a student's run: agreement with its teachers, feature maps and losses."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import atomic, write_text
from distill.display.pages import Picture, render
from distill.display.tables import Cell
from distill.display.text import chart_text
from distill.runtime.tracking import read_metrics
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.trained import Trained

PICTURE = "teachers_in_student.png"
_METRICS = {
    "fidelity": "fidelity",
    "spatial_cosine": "spatial cosine",
    "summary_cosine": "summary cosine",
}


def write_page(
    trained: Trained, rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Path]
) -> Path:
    """Writes `page/index.html` into the run's folder, with its pictures inside; returns its path.

    The first picture is also written beside it, as `teachers_in_student.png`.

    Args:
        trained: the run.
        rows: those of `fidelity.jsonl`.
        panels: PNG files of feature maps by the size of the student's input, `256 x 256 px`.
    """
    recipe = trained.recipe
    path = trained.run / "page" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {
        size: Picture(
            file.read_bytes(),
            f"Feature maps at {size}: for each image those of its teachers, and beside each what "
            "the student predicts of it, after and before training",
        )
        for size, file in panels.items()
    }
    with atomic(path.with_name(PICTURE)) as partial:
        partial.write_bytes(next(iter(pictures.values())).png)
    page = render(
        "student_run.html.jinja",
        title=trained.run.absolute().name,
        teachers=", ".join(f"{n} ({c.kind})" for n, c in recipe.teachers.items()),
        step=trained.step,
        images=_images(recipe),
        checkpoint=trained.checkpoint,
        started_from=rows[0].get("started_from"),
        students=list(dict.fromkeys(map(shown_student, rows))),
        agreement=_agreement(rows),
        panels=pictures,
        losses=_losses(trained.run),
    )
    write_text(path, page)
    return path


def shown_student(row: Mapping[str, Any]) -> str:
    """The name of a row's student: before training `start`, unless its weights were random."""
    before = row["student"] == "untrained" and row.get("started_from") is not None
    return "start" if before else str(row["student"])


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
