"""One HTML file that shows results of benchmarks: tables, pictures, and how all was measured."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.display.html_parts import document, image, sheet_table, text
from distill.display.tables import Sheet
from distill.evaluation.results import Result, facts
from distill.evaluation.suite import row_folder
from distill.runtime.files import write_text


def write_report(
    folder: Path, results: Sequence[Result], tables: Sequence[Sheet], changes: Sheet | None
) -> Path:
    """Writes `index.html`; pictures are inside the file.

    Args:
        folder: for the page.
        results: what was measured.
        tables: one a benchmark, titled with its name.
        changes: against a baseline.

    Returns:
        The page.
    """
    title = folder.absolute().name
    body = [
        f"<h1>{text(title)}</h1>",
        f"<p>Means ± standard deviations over the seeds of {_random(results)} The best is "
        "bold.</p>",
    ]
    if changes is not None:
        body += [
            f"<h2>{text(changes.title)}</h2>",
            sheet_table(changes),
            "<p>A group is the mean relative change of its tasks, positive where the model is "
            "better; Delta_m is the mean of the groups, each of the same weight. ± is the standard "
            "deviation over seeds of the paired differences; there is none where the two models "
            "were not measured with the same seeds, or with one.</p>",
        ]
    for table in tables:
        own = [result for result in results if result.row["benchmark"] == table.title]
        body += [f"<h2>{text(table.title)}</h2>", sheet_table(table)]
        body += _pictures(own)
        body += _folded("Protocol", own, ("entry", "protocol"))
    body.append("<h2>Models</h2>")
    for name in dict.fromkeys(result.row["model"] for result in results):
        own = [result for result in results if result.row["model"] == name]
        body += _folded(name, own, ("encoder", "fingerprint"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    write_text(path, document(title, body))
    return path


def _random(results: Sequence[Result]) -> str:
    """What the seeds stand for: where a model has several weights, it was trained several times."""
    weights: dict[str, set[str]] = {}
    for result in results:
        weights.setdefault(result.row["model"], set()).add(result.row["fingerprint"])
    trained = [name for name, of_model in weights.items() if len(of_model) > 1]
    if trained:
        return (
            f"a model's training, and of what is random in a benchmark. {text(', '.join(trained))} "
            "stand for several trainings each."
        )
    return (
        "what is random in a benchmark, such as its probe; how far two trainings of one encoder "
        "lie apart is not in them."
    )


def _pictures(results: Sequence[Result]) -> list[str]:
    """Of the first seed of each model; equal names side by side."""
    first: dict[str, Result] = {}
    for result in results:
        first.setdefault(result.row["model"], result)
    named: dict[str, list[str]] = {}
    for model, result in first.items():
        for path in sorted(row_folder(result.suite, result.row).glob("*.png")):
            described = f"{path.stem} of {model} at {result.row['benchmark']}"
            named.setdefault(path.stem, []).append(image(path.read_bytes(), described, model))
    return [
        f'<h3>{text(stem)}</h3>\n<div class="beside">{"".join(shown)}</div>'
        for stem, shown in named.items()
    ]


def _folded(title: str, results: Sequence[Result], keys: Iterable[str]) -> list[str]:
    """Facts behind a heading that opens; where models differ, each value with its models."""
    keys = list(keys)
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for name, value in facts(result.row, keys).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            models = found.setdefault(name, {}).setdefault(shown, [])
            if result.row["model"] not in models:
                models.append(result.row["model"])
    lines = [
        f'<tr><th scope="row">{text(name)}</th><td>{text(_values(values))}</td></tr>'
        for name, values in found.items()
    ]
    table = "\n".join(["<table class=facts><tbody>", *lines, "</tbody></table>"])
    return [f"<details><summary>{text(title)}</summary>\n{table}\n</details>"]


def _values(values: dict[str, list[str]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({', '.join(models)})" for value, models in values.items())
