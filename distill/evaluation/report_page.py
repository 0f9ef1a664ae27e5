"""Writes the page of benchmark results: tables, pictures and protocols."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.files import write_text
from distill.display.pages import Picture, render
from distill.display.tables import Table
from distill.evaluation.results import Result, facts
from distill.evaluation.suite import row_folder


def write_report(
    folder: Path, results: Sequence[Result], tables: Sequence[Table], changes: Table | None
) -> Path:
    """Writes `index.html`, one file with its pictures inside, into a folder; returns its path.

    There is one table for each benchmark, whose title is the benchmark's name.
    """
    of_benchmark = _grouped(results, "benchmark")
    page = render(
        "report.html.jinja",
        title=folder.absolute().name,
        retrained=[  # several weights under one name: their seeds are trainings
            name
            for name, own in _grouped(results, "model").items()
            if len({result.row["fingerprint"] for result in own}) > 1
        ],
        changes=changes,
        tables=tables,
        pictures={name: _pictures(own) for name, own in of_benchmark.items()},
        protocols={name: _merged(own, ("entry", "protocol")) for name, own in of_benchmark.items()},
        models={
            name: _merged(own, ("encoder", "fingerprint"))
            for name, own in _grouped(results, "model").items()
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    write_text(path, page)
    return path


def _grouped(results: Iterable[Result], key: str) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row[key], []).append(result)
    return groups


def _pictures(results: Sequence[Result]) -> dict[str, list[Picture]]:
    """By the name of the file, one picture for each model: that of its first seed."""
    named: dict[str, list[Picture]] = {}
    for model, (result, *_) in _grouped(results, "model").items():
        for path in sorted(row_folder(result.suite, result.row).glob("*.png")):
            description = f"{path.stem} of {model} at {result.row['benchmark']}"
            picture = Picture(path.read_bytes(), description, model)
            named.setdefault(path.stem, []).append(picture)
    return named


def _merged(results: Sequence[Result], keys: Sequence[str]) -> dict[str, str]:
    """Facts of some results by name; where models differ, each value with its models."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for name, value in facts(result.row, keys).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            models = found.setdefault(name, {}).setdefault(shown, [])
            if result.row["model"] not in models:
                models.append(result.row["model"])
    return {
        name: next(iter(values))
        if len(values) == 1
        else "; ".join(f"{value} ({', '.join(models)})" for value, models in values.items())
        for name, values in found.items()
    }
