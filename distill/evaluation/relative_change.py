"""Relative changes of models against a baseline: by task group, and their mean Delta_m.

For a group g of tasks i, a candidate M and the baseline B

    delta(g) = 100 * mean_i s_i (M_i - B_i) / B_i,   s_i = -1 if lower is better, else 1.

Delta_m is the mean of delta(g) over groups, with equal weights whatever the number of tasks
(Maninis et al., "Attentive Single-Tasking of Multiple Tasks", 2019; by groups as in the table of
students of Ranzinger et al., FeatSharp, 2025, arXiv 2502.16025). M_i and B_i are means over seeds.

Spread: if candidate and baseline were measured with the same seeds, each seed has its own
differences relative to the same B_i. The delta(g) and Delta_m of these have the values above as
their means, and their standard deviation (n - 1) is the spread. Pairing removes the effect that a
seed has on both. A task without seeds adds its one difference to every seed. There is no spread
for a single seed or if the seeds differ. Seeds are those of probes, so the spread does not include
the variation between trainings of one recipe.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from distill.benchmarks.benchmark import metric_key
from distill.display.tables import Cell, Table
from distill.runtime.errors import RecipeError
from teachers.messages import did_you_mean

Rows = Sequence[Mapping[str, Any]]
Groups = Mapping[str, Sequence[str]]


class Change(NamedTuple):
    """A relative change in per cent; positive is better.

    Attributes:
        mean: over seeds.
        spread: standard deviation over paired seeds; None if the seeds are not paired.
    """

    mean: float
    spread: float | None


class ModelChange(NamedTuple):
    """The changes of one model: delta(g) of each group, and their total Delta_m."""

    groups: dict[str, Change]
    total: Change


class Changes(NamedTuple):
    """The changes of all models, the baseline included, and the tasks of each group."""

    baseline: str
    tasks: dict[str, list[str]]
    models: dict[str, ModelChange]


def relative_changes(rows: Rows, baseline: str, groups: Groups) -> Changes:
    """Computes the changes of every model against the baseline.

    Args:
        rows: rows of `results.jsonl`, see `suite.run_suite`.
        baseline: name of a model.
        groups: name to tasks, `benchmark` (its first metric) or `benchmark.metric`; if empty, each
            benchmark is a group.

    Raises:
        RecipeError: no such baseline or task, a model lacks a metric, or a metric of the baseline
            is not above 0.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    require_known("baseline", baseline, models, "model")
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    tasks = {
        group: [_task(rows, *split_task(f"groups.{group}", item, benchmarks)) for item in items]
        for group, items in (groups or {name: [name] for name in benchmarks}).items()
    }
    return Changes(
        baseline,
        {group: [task.name for task in of_group] for group, of_group in tasks.items()},
        {model: _model_change(model, baseline, tasks) for model in models},
    )


def change_table(changes: Changes) -> Table:
    """The changes as a table with a row for each model, the best of each column in bold."""
    columns = {model: [*c.groups.values(), c.total] for model, c in changes.models.items()}
    best = [max(c.mean for c in column) for column in zip(*columns.values(), strict=True)]
    lines = [
        (
            model,
            [
                Cell("0" if model == changes.baseline else _written(change), change.mean == most)
                for change, most in zip(line, best, strict=True)
            ],
        )
        for model, line in columns.items()
    ]
    note = "; ".join(f"{group}: {', '.join(tasks)}" for group, tasks in changes.tasks.items())
    title = f"Change against {changes.baseline}, %"
    return Table(title, ("model", *changes.tasks, "Delta_m"), lines, note)


def split_task(where: str, item: str, benchmarks: Iterable[str]) -> tuple[str, str | None]:
    """Splits an item of a group into benchmark and metric; None stands for the first metric.

    Args:
        where: place of the item, for messages.
        item: `benchmark` or `benchmark.metric`; either name may have dots.
        benchmarks: the names of all benchmarks.

    Raises:
        RecipeError: no such benchmark.
    """
    known = list(benchmarks)
    for name in sorted(known, key=len, reverse=True):
        if item == name:
            return name, None
        if item.startswith(f"{name}."):
            return name, item.removeprefix(f"{name}.")
    raise _unknown(where, item.partition(".")[0], known, "benchmark")


def require_known(where: str, name: str, known: Iterable[str], noun: str) -> None:
    """Checks that a name is among the known ones.

    Raises:
        RecipeError: it is not; the message has its place (`where`), what it names (`noun`), the
            known names and the closest one.
    """
    known = list(known)
    if name not in known:
        raise _unknown(where, name, known, noun)


def _unknown(where: str, name: str, known: Sequence[str], noun: str) -> RecipeError:
    return RecipeError(
        f"{where}: there is no {noun} {name!r}{did_you_mean(name, known)}; "
        f"there are {', '.join(known)}"
    )


class _Task(NamedTuple):
    """One metric of one benchmark, `benchmark.metric`: model to seed to value."""

    name: str
    lower_is_better: bool
    values: dict[str, dict[int, float]]


def _task(rows: Rows, benchmark: str, metric: str | None) -> _Task:
    own = [row for row in rows if row["benchmark"] == benchmark]
    metric = metric if metric is not None else next(iter(own[0]["figures"]))
    known = dict.fromkeys(key for row in own for key in row["figures"])
    if metric not in known:  # recipes of older versions have `coco.AP small`
        metric = {metric_key(key): key for key in known}.get(metric_key(metric), metric)
    require_known(f"groups: {benchmark}", metric, known, "metric")
    values: dict[str, dict[int, float]] = {}
    for row in own:
        if metric in row["figures"]:
            values.setdefault(row["model"], {})[row["seed"]] = row["figures"][metric]
    lower = any(metric in row["lower_is_better"] for row in own)
    return _Task(f"{benchmark}.{metric}", lower, values)


def _model_change(model: str, baseline: str, tasks: Mapping[str, Sequence[_Task]]) -> ModelChange:
    every = [task for group in tasks.values() for task in group]
    means = {
        group: mean(_change(task, model, baseline, None) for task in of_group)
        for group, of_group in tasks.items()
    }
    by_seed = [
        {
            group: mean(_change(task, model, baseline, seed) for task in of_group)
            for group, of_group in tasks.items()
        }
        for seed in _paired_seeds(every, model, baseline)
    ]
    groups = {g: Change(means[g], _spread([each[g] for each in by_seed])) for g in tasks}
    totals = [mean(each.values()) for each in by_seed]
    return ModelChange(groups, Change(mean(means.values()), _spread(totals)))


def _change(task: _Task, model: str, baseline: str, seed: int | None) -> float:
    """The change in per cent of the means over seeds, or of one seed relative to the same mean."""
    ours, theirs = _values(task, model), _values(task, baseline)
    base = mean(theirs.values())
    if base <= 0:
        raise RecipeError(
            f"baseline: {baseline!r} has {base:g} at {task.name}, and a relative change needs a "
            "value above 0; leave the task out of the groups or choose another baseline"
        )
    difference = _at(ours, seed) - _at(theirs, seed)
    return (-100 if task.lower_is_better else 100) * difference / base


def _values(task: _Task, model: str) -> dict[int, float]:
    if model not in task.values:
        raise RecipeError(
            f"groups: model {model!r} was not measured at {task.name}; measure it, or leave the "
            "task out of the groups"
        )
    return task.values[model]


def _at(values: Mapping[int, float], seed: int | None) -> float:
    """The value of a seed; the mean for no seed; the only value of a task without seeds."""
    return mean(values.values()) if seed is None or len(values) == 1 else values[seed]


def _paired_seeds(tasks: Iterable[_Task], model: str, baseline: str) -> list[int]:
    """The seeds that model and baseline share at every task; none if they differ."""
    sides = {
        frozenset(_values(task, name))
        for task in tasks
        for name in (model, baseline)
        if len({*_values(task, model), *_values(task, baseline)}) > 1
    }
    return sorted(next(iter(sides))) if len(sides) == 1 else []


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _written(change: Change) -> str:
    spread = "" if change.spread is None else f" ± {change.spread:.2f}"
    return f"{change.mean:+.2f}{spread}"
