"""Results of benchmarks as tables: means over seeds, their spread, the best marked."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from distill.display.tables import Cell, Sheet


def results_sheets(rows: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """A table a benchmark, a line a model.

    Args:
        rows: lines of `results.jsonl`, see `suite.run_suite`.
    """
    names = dict.fromkeys(row["benchmark"] for row in rows)
    return [_sheet(name, [row for row in rows if row["benchmark"] == name]) for name in names]


def _sheet(name: str, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    models: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    figures = list(dict.fromkeys(key for row in rows for key in row["figures"]))
    lower = {key for row in rows for key in row["lower_is_better"]}
    heads = (f"{key} (lower is better)" if key in lower else key for key in figures)
    best = {key: _best(models, key, key in lower) for key in figures}
    lines = [
        (model, [Cell(str(len(seeds))), *(_cell(_values(seeds, k), best[k]) for k in figures)])
        for model, seeds in models.items()
    ]
    return Sheet(name, ("model", "seeds", *heads), lines)


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A figure of each row that has it."""
    return [row["figures"][key] for row in rows if key in row["figures"]]


def _best(models: Mapping[str, list[Mapping[str, Any]]], key: str, lower: bool) -> float | None:
    means = [mean(found) for seeds in models.values() if (found := _values(seeds, key))]
    return (min if lower else max)(means, default=None)


def _cell(found: list[float], best: float | None) -> Cell:
    if not found:
        return Cell("-")
    middle = mean(found)
    spread = f" ± {stdev(found):.2g}" if len(found) > 1 else ""
    return Cell(f"{middle:.4g}{spread}", middle == best)
