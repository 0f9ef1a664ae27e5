"""Results of several suites, brought together: `task: report`.

Nothing is measured. Figures stand in one table only if they were measured alike, so a benchmark
must have the same entry and protocol in all suites, and a model the same weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from distill.display.tables import Cell, Table
from distill.evaluation.suite import RESULTS, TaskGroups, read_results
from distill.runtime.errors import RecipeError
from teachers.kinds import did_you_mean

# What two rows of one name must share.
_SAME = {"benchmark": ("entry", "protocol"), "model": ("encoder", "fingerprint")}


class ReportRecipe(BaseModel):
    """Suites to compare.

    Attributes:
        dir: the folder for the report.
        results: the folders of suites that were run.
        baseline: the model that the others' relative changes are against; None for no table of
            them.
        groups: of tasks, see `report.relative_changes`.
        may_differ: facts that do not count for the figures, by the name that the refusal gives
            them: `entry.dataset.root` where the suites ran on two machines; `encoder.path` and
            `fingerprint` where a model's name stands for several trainings of one recipe, one a
            suite, each suite with a seed of its own. Spreads are then of whole trainings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["report"]
    dir: Path
    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    baseline: str | None = None
    groups: TaskGroups = {}
    may_differ: tuple[str, ...] = ()


class Result(NamedTuple):
    """What was measured once.

    Attributes:
        suite: the folder of its suite.
        row: the line of `results.jsonl`.
    """

    suite: Path
    row: dict[str, Any]


def read_suites(folders: Iterable[Path], may_differ: Sequence[str] = ()) -> list[Result]:
    """All lines of some suites' results.

    Args:
        folders: of the suites.
        may_differ: names of facts that are not compared, see `ReportRecipe`.

    Raises:
        RecipeError: a folder has no results, one thing was measured in two of them, or one name
            stands for what differs.
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
    """What a line says under some of its keys, nested names joined by dots.

    Args:
        row: a line of `results.jsonl`.
        keys: such as `entry` and `protocol`.
    """
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
    known = {name for result in results for name in facts(result.row, keys)}
    for name in may_differ:
        if name not in known:
            raise RecipeError(
                f"may_differ: no result has a fact {name!r}{did_you_mean(name, known)}; they are "
                "named as in results.jsonl, such as entry.dataset.root or protocol.input.size"
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
            if differing:
                raise RecipeError(
                    f"results: {kind} {name!r} is not the same in {_place(known)} and "
                    f"{_place(result)}: {'; '.join(differing)}. Measure alike, use two names, or "
                    "list what does not count in may_differ"
                )


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
    heads = (f"{key} (lower is better)" if key in lower else key for key in figures)
    best = {key: _best(models, key, key in lower) for key in figures}
    lines = [
        (model, [Cell(str(len(seeds))), *(_cell(_values(seeds, k), best[k]) for k in figures)])
        for model, seeds in models.items()
    ]
    return Table(name, ("model", "seeds", *heads), lines)


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
