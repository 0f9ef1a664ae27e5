"""One HTML file that shows a run: its losses, what the student sees, and the table of agreement."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.files import write_text
from distill.tracking import read_metrics
from distill.trained import Trained

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.better { font-weight: 600; }
"""
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
        f"<h1>{_text(trained.run.absolute().name)}</h1>",
        f"<p>A student distilled from {_text(teachers)}: {trained.step} steps of "
        f"{recipe.run.batch_size} images at {recipe.run.resolution[0]} x "
        f"{recipe.run.resolution[1]} px. Checkpoint: {_text(trained.checkpoint)}.</p>",
        "<h2>Agreement with the teachers on held-out images</h2>",
        _table(rows),
        "<p>Fidelity is the variance of the teacher's map over the mean squared error of the "
        "student's: 1 is what the best constant would reach, higher is better. Cosines are means "
        "over cells and over images.</p>",
    ]
    for title, picture in pictures.items():
        body += [f"<h2>Features at {_text(title)}</h2>", _image(picture.read_bytes(), title)]
    body += [
        "<p>Three principal components of each teacher's map as red, green and blue. The student's "
        "maps are shown on the teacher's axes and scale: equal colours are equal features.</p>",
        "<h2>Losses</h2>",
        _losses(trained.run),
    ]
    head = f'<meta charset="utf-8"><title>{_text(trained.run.absolute().name)}</title>'
    path = trained.run / "page" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n",
    )
    return path


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each teacher, resolution and measure: untrained beside trained."""
    students = list(dict.fromkeys(row["student"] for row in rows))
    lines = ["teacher", "resolution", "measure", *students]
    out = ["<table>", "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in lines) + "</tr>"]
    places = list(dict.fromkeys((row["teacher"], tuple(row["resolution"])) for row in rows))
    for teacher, (height, width) in places:
        here = {
            row["student"]: row
            for row in rows
            if (row["teacher"], tuple(row["resolution"])) == (teacher, (height, width))
        }
        for key, name in _METRICS:
            figures = [here[student][key] for student in students]
            if None in figures:
                continue
            best = max(figures)
            cells = "".join(
                f"<td{' class=better' if figure == best else ''}>{figure:.3f}</td>"
                for figure in figures
            )
            size = f"{height} x {width}"
            out.append(f"<tr><td>{_text(teacher)}</td><td>{size}</td><td>{name}</td>{cells}</tr>")
    return "\n".join([*out, "</table>"])


def _losses(run: Path) -> str:
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
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
    return _image(buffer.getvalue(), "loss curves")


def _image(png: bytes, title: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title, quote=True)}" src="data:image/png;base64,{data}">'


def _text(value: object) -> str:
    return html.escape(str(value))
