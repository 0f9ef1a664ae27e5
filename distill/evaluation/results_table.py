"""Results of benchmarks as tables: means over seeds, their spread, the best in bold."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rich.table import Table


def results_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table a benchmark, a line a model.

    Args:
        rows: lines of `results.jsonl`, see `suite.run_suite`.
    """
    names = dict.fromkeys(row["benchmark"] for row in rows)
    return [_table(name, [row for row in rows if row["benchmark"] == name]) for name in names]


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    models: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    figures = list(dict.fromkeys(key for row in rows for key in row["figures"]))
    lower = {key for row in rows for key in row["lower_is_better"]}
    table = Table("model", "seeds", title=name)
    for key in figures:
        table.add_column(f"{key} {'(lower is better)' if key in lower else ''}".strip())
        table.columns[-1].justify = "right"
    best = {key: _best(models, key, key in lower) for key in figures}
    for model, seeds in models.items():
        cells = [_cell(values(seeds, key), best[key]) for key in figures]
        table.add_row(model, str(len(seeds)), *cells)
    return table


def values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A figure of each row that has it."""
    return [row["figures"][key] for row in rows if key in row["figures"]]


def _best(models: Mapping[str, list[Mapping[str, Any]]], key: str, lower: bool) -> float | None:
    means = [mean(found) for seeds in models.values() if (found := values(seeds, key))]
    return (min if lower else max)(means, default=None)


def _cell(found: list[float], best: float | None) -> str:
    if not found:
        return "-"
    middle = mean(found)
    text = f"{middle:.4g}" + (f" ± {stdev(found):.2g}" if len(found) > 1 else "")
    return f"[bold]{text}[/bold]" if middle == best else text
