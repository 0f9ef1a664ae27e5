"""One HTML file that shows a run: its losses, what the student sees, and the table of agreement."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_text
from distill.display.html_parts import code, document, image, table_cell, text
from distill.runtime.tracking import read_metrics
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.trained import Trained

_METRICS = (
    ("fidelity", "fidelity"),
    ("spatial_cosine", "spatial cosine"),
    ("summary_cosine", "summary cosine"),
)


def write_page(
    trained: Trained, rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Path]
) -> Path:
    """Writes `page/index.html` into the run's folder; pictures are inside the file.

    Args:
        trained: the run.
        rows: the lines of `fidelity.jsonl`.
        pictures: heading to PNG.

    Returns:
        The page.
    """
    recipe = trained.recipe
    teachers = ", ".join(f"{n} ({c.kind})" for n, c in recipe.teachers.items())
    body = [
        f"<h1>{text(trained.run.absolute().name)}</h1>",
        f"<p>A student distilled from {text(teachers)}: {trained.step} steps of "
        f"{text(_images(recipe))}. Checkpoint: {code(trained.checkpoint)}.</p>",
        "<h2>Agreement with the teachers on held-out images</h2>",
        _table(rows),
        "<p>Fidelity is the variance of the teacher's map over the mean squared error of the "
        "student's: 1 is what the best constant would reach, higher is better. Cosines are means "
        "over cells and over images.</p>",
    ]
    for title, picture in pictures.items():
        described = f"Feature maps at {title}: for each image its teachers' and the students'"
        body += [f"<h2>Features at {text(title)}</h2>", image(picture.read_bytes(), described)]
    body += [
        "<p>Three principal components of each teacher's map as red, green and blue. The student's "
        "maps are shown on the teacher's axes and scale: equal colours are equal features.</p>",
        "<h2>Losses</h2>",
        _losses(trained.run),
    ]
    path = trained.run / "page" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, document(trained.run.absolute().name, body))
    return path


def _images(recipe: StudentRecipe) -> str:
    """What a step reads: `64 images at 256 x 256 or 432 x 432 px and 8 images at ...`."""
    arms = []
    for arm in recipe.placed_arms.values():
        sizes = " or ".join(f"{s.size[0]} x {s.size[1]}" for s in arm.resolution.root)
        arms.append(f"{arm.batch_size} images at {sizes} px")
    return " and ".join(arms)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A group for each teacher and resolution, a line for each measure, the students beside.

    The best figure of a line is bold. Three columns fit a telephone's screen.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        height, width = row["resolution"]
        place = f"{row['teacher']}, {height} x {width} px"
        groups.setdefault(place, {})[row["student"]] = row
    students = list(dict.fromkeys(row["student"] for row in rows))
    heads = "".join(f'<th scope="col">{text(student)}</th>' for student in students)
    out = [f"<figure><table><thead><tr><td></td>{heads}</tr></thead>"]
    for place, group in groups.items():
        span = f'scope="rowgroup" colspan="{1 + len(students)}"'
        out.append(f"<tbody><tr><th {span}>{text(place)}</th></tr>")
        for key, name in _METRICS:
            figures = [group[student][key] for student in students]
            if None not in figures:
                out.append(f'<tr><th scope="row">{name}</th>{_cells(figures)}</tr>')
        out.append("</tbody>")
    return "\n".join([*out, "</table></figure>"])


def _cells(figures: Sequence[float]) -> str:
    best = max(figures)
    return "".join(table_cell(f"{figure:.3f}", figure == best) for figure in figures)


def _losses(run: Path) -> str:
    written = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    lines = [line for line in written if "loss" in line]
    if not lines:
        return "<p>The run has written no metrics.</p>"
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    total, parts = figure.subplots(1, 2)
    for name in [key for key in lines[0] if key == "loss" or key.startswith("loss/")]:
        axes = total if name == "loss" else parts
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("loss/"))
    for axes, title in ((total, "total loss"), (parts, "loss of each teacher, unweighted")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    parts.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    first, last = lines[0], lines[-1]
    described = (
        f"Curves of the losses; the total goes from {first['loss']:.3f} at step {first['step']} "
        f"to {last['loss']:.3f} at step {last['step']}"
    )
    return image(buffer.getvalue(), described)
