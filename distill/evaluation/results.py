"""Combines the results of several suites, `task: report`, and tabulates results.

A report measures nothing. Metrics share a table only if they were measured in the same way: a
benchmark must have the same entry and protocol in all suites, and a model the same weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from data.labelled.digest import same_data
from distill.display.tables import Cell, Table
from distill.evaluation.suite import RESULTS, TaskGroups, read_results
from distill.runtime.errors import RecipeError
from teachers.config import StrictConfig
from teachers.messages import did_you_mean

# The keys that two rows of the same benchmark or model must share.
_SAME = {"benchmark": ("entry", "protocol"), "model": ("encoder", "fingerprint")}
_DATA = "data"  # of a benchmark, compared where both rows recorded it


class ReportRecipe(StrictConfig):
    """Suites to compare.

    Attributes:
        dir: the folder for the report.
        results: the folders of suites that were run.
        baseline: the model that relative changes are computed against; None for no such table.
        groups: groups of tasks, see `relative_change.relative_changes`.
        may_differ: facts that do not affect the metrics, by the names that the error message gives
            them: `entry.dataset.root` (and `data`, if its files were copied and not read whole) if
            the suites ran on two machines; `encoder.path` and
            `fingerprint` if the name of a model stands for several trainings of one recipe, one in
            each suite, and each suite has its own seed. Spreads are then over whole trainings.
    """

    task: Literal["report"]
    dir: Path
    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    baseline: str | None = None
    groups: TaskGroups = {}
    may_differ: tuple[str, ...] = ()


class Result(NamedTuple):
    """One measurement: the folder of its suite, and its row of `results.jsonl`."""

    suite: Path
    row: dict[str, Any]


def read_suites(folders: Iterable[Path], may_differ: Sequence[str] = ()) -> list[Result]:
    """Reads the results in the folders of several suites; for `may_differ` see `ReportRecipe`.

    Raises:
        RecipeError: a folder has no results, two have the same measurement, or a benchmark or a
            model differs between them.
    """
    results: list[Result] = []
    for folder in folders:
        rows = read_results(folder)
        if not rows:
            raise RecipeError(
                f"results: {folder} has no {RESULTS}; run its suite, "
                f"python -m distill.evaluate SUITE dir={folder}"
            )
        results += [Result(folder, row) for row in rows]
    _require_known_facts(results, may_differ)
    _require_alike(results, may_differ)
    _require_once(results)
    return results


def facts(row: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The values under some keys of a row of `results.jsonl`; dots join nested names."""
    found: dict[str, Any] = {}
    for key in keys:
        if isinstance(row[key], Mapping) and row[key]:
            inner = facts(row[key], row[key])
            found |= {f"{key}.{name}": value for name, value in inner.items()}
        else:
            found[key] = row[key]
    return found


def _require_known_facts(results: Sequence[Result], may_differ: Sequence[str]) -> None:
    keys = [key for of_kind in _SAME.values() for key in of_kind]
    known = {name for result in results for name in facts(result.row, keys)} | {_DATA}
    for name in may_differ:
        if name not in known:
            raise RecipeError(
                f"may_differ: no result has a fact {name!r}{did_you_mean(name, known)}; facts have "
                "the names of results.jsonl, such as entry.dataset.root or protocol.input.size"
            )


def _require_alike(results: Sequence[Result], may_differ: Sequence[str]) -> None:
    for kind, keys in _SAME.items():
        first: dict[str, Result] = {}
        for result in results:
            name = result.row[kind]
            known = first.setdefault(name, result)
            ours, theirs = facts(known.row, keys), facts(result.row, keys)
            differing = [
                f"{key} is {ours.get(key)!r} there, {theirs.get(key)!r} here"
                for key in dict.fromkeys([*ours, *theirs])
                if ours.get(key) != theirs.get(key) and key not in may_differ
            ]
            if kind == "benchmark" and _DATA not in may_differ:
                differing += _other_data(known.row, result.row)
            if differing:
                raise RecipeError(
                    f"results: {kind} {name!r} is not the same in {_place(known)} and "
                    f"{_place(result)}: {'; '.join(differing)}. Measure both in the same way, use "
                    "two names, or list facts that do not affect the metrics in may_differ"
                )


def _other_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The difference of two rows' data, if both recorded them; older versions did not."""
    there, here = one.get(_DATA), other.get(_DATA)
    if not there or not here or same_data(there, here):
        return []
    by = "contents" if there["contents"] and here["contents"] else "times"
    hint = "" if by == "contents" else "; copies are known as such with data_digest=contents"
    return [f"{_DATA}: {there['files']} files there, {here['files']} here, of other {by}{hint}"]


def _require_once(results: Sequence[Result]) -> None:
    seen: dict[tuple[Any, ...], Result] = {}
    for result in results:
        key = tuple(result.row[name] for name in ("benchmark", "model", "seed"))
        if key in seen:
            raise RecipeError(
                f"results: {key[1]!r} at {key[0]!r} with seed {key[2]} is in {seen[key].suite} and "
                f"in {result.suite}; leave one of them out"
            )
        seen[key] = result


def _place(result: Result) -> str:
    row = result.row
    return f"{result.suite} ({row['benchmark']}, {row['model']}, seed {row['seed']})"


def results_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table of models by metrics for each benchmark in rows of `results.jsonl`."""
    names = dict.fromkeys(row["benchmark"] for row in rows)
    return [_table(name, [row for row in rows if row["benchmark"] == name]) for name in names]


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    models: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    metrics = list(dict.fromkeys(key for row in rows for key in row["figures"]))
    lower = {key for row in rows for key in row["lower_is_better"]}
    best = {key: _best(models, key, key in lower) for key in metrics}
    lines = [
        (model, [Cell(str(len(seeds))), *(_cell(_values(seeds, k), best[k]) for k in metrics)])
        for model, seeds in models.items()
    ]
    return Table(name, ("model", "seeds", *(_heading(k, k in lower) for k in metrics)), lines)


def _heading(metric: str, lower: bool) -> str:
    return metric.replace("_", " ") + (" (lower is better)" if lower else "")


def _values(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """The metric in those rows that have it."""
    return [row["figures"][metric] for row in rows if metric in row["figures"]]


def _best(models: Mapping[str, list[Mapping[str, Any]]], metric: str, lower: bool) -> float | None:
    means = [mean(found) for seeds in models.values() if (found := _values(seeds, metric))]
    return (min if lower else max)(means, default=None)


def _cell(found: list[float], best: float | None) -> Cell:
    if not found:
        return Cell("-")
    average = mean(found)
    spread = f" ± {stdev(found):.2g}" if len(found) > 1 else ""
    return Cell(f"{average:.4g}{spread}", average == best)
