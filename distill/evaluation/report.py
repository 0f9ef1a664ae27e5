"""What candidates gain over a baseline: relative change a task group, and Delta_m.

For a group g of tasks i, a candidate M and the baseline B

    delta(g) = 100 * mean_i s_i (M_i - B_i) / B_i,   s_i = -1 where lower is better, else 1,

and Delta_m is the mean of delta(g) over groups, each of the same weight whatever its number of
tasks (Maninis et al., "Attentive Single-Tasking of Multiple Tasks", 2019, by groups as in the
FeatSharp paper's table of students). M_i and B_i are means over seeds.

Spread: where candidate and baseline were measured with the same seeds, each seed gives differences
of its own, over the same B_i; their delta(g) and Delta_m have the figures above as their means,
and their standard deviation (n - 1) is the spread. Pairing takes out what a seed does to both.
A task without seeds adds its one difference to every seed. With other seeds on either side, or a
single one, there is no spread. Seeds are those of probes: how far two trainings of one recipe lie
apart is not in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from distill.benchmarks.benchmark import metric_key
from distill.display.tables import Cell, Table
from distill.runtime.errors import RecipeError
from teachers.kinds import did_you_mean

Rows = Sequence[Mapping[str, Any]]
Groups = Mapping[str, Sequence[str]]


class Change(NamedTuple):
    """A relative change in per cent; positive is better.

    Attributes:
        mean: over seeds.
        spread: standard deviation of the seeds' own; None where they are not paired.
    """

    mean: float
    spread: float | None


class ModelChange(NamedTuple):
    """What a model gains.

    Attributes:
        groups: delta(g) of each group.
        total: Delta_m.
    """

    groups: dict[str, Change]
    total: Change


class Changes(NamedTuple):
    """What models gain over one of them.

    Attributes:
        baseline: that one.
        tasks: the figures of each group, `benchmark.figure`.
        models: all, the baseline among them.
    """

    baseline: str
    tasks: dict[str, list[str]]
    models: dict[str, ModelChange]


def relative_changes(rows: Rows, baseline: str, groups: Groups) -> Changes:
    """The changes of every model against the baseline.

    Args:
        rows: lines of `results.jsonl`, see `suite.run_suite`.
        baseline: a model.
        groups: name to tasks, `benchmark` (its first figure) or `benchmark.figure`; every
            benchmark is a group of its own where there are none.

    Raises:
        RecipeError: no such baseline or task, a figure that a model lacks, a baseline's figure
            that is not above 0.
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
    """The changes as a table, a line a model, the best of each column marked."""
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
    """A group's item as benchmark and figure; None stands for the first.

    Args:
        where: what a message calls its place.
        item: `benchmark` or `benchmark.figure`; either name may have dots.
        benchmarks: those that there are.

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
    """Refuses a name that there is not.

    Raises:
        RecipeError: with those that there are, and the closest.
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
    """One figure: of each model, by seed."""

    name: str
    lower_is_better: bool
    figures: dict[str, dict[int, float]]


def _task(rows: Rows, benchmark: str, figure: str | None) -> _Task:
    own = [row for row in rows if row["benchmark"] == benchmark]
    figure = figure if figure is not None else next(iter(own[0]["figures"]))
    known = dict.fromkeys(key for row in own for key in row["figures"])
    if figure not in known:  # recipes of older versions have `coco.AP small`
        figure = {metric_key(key): key for key in known}.get(metric_key(figure), figure)
    require_known(f"groups: {benchmark}", figure, known, "figure")
    figures: dict[str, dict[int, float]] = {}
    for row in own:
        if figure in row["figures"]:
            figures.setdefault(row["model"], {})[row["seed"]] = row["figures"][figure]
    lower = any(figure in row["lower_is_better"] for row in own)
    return _Task(f"{benchmark}.{figure}", lower, figures)


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
    """The change in per cent: of means over seeds, or of one seed over the baseline's mean."""
    ours, theirs = _figures(task, model), _figures(task, baseline)
    base = mean(theirs.values())
    if base <= 0:
        raise RecipeError(
            f"baseline: {baseline!r} has {base:g} at {task.name}; a change relative to it means "
            "nothing, leave the task out of the groups or take another baseline"
        )
    difference = _at(ours, seed) - _at(theirs, seed)
    return (-100 if task.lower_is_better else 100) * difference / base


def _figures(task: _Task, model: str) -> dict[int, float]:
    if model not in task.figures:
        raise RecipeError(
            f"groups: model {model!r} has no figure {task.name}; measure it, or leave the task "
            "out of the groups"
        )
    return task.figures[model]


def _at(figures: Mapping[int, float], seed: int | None) -> float:
    """A seed's figure, the only one where there is one, the mean without a seed."""
    return mean(figures.values()) if seed is None or len(figures) == 1 else figures[seed]


def _paired_seeds(tasks: Iterable[_Task], model: str, baseline: str) -> list[int]:
    """The seeds that model and baseline have at every task; none where they differ."""
    sides = {
        frozenset(_figures(task, name))
        for task in tasks
        for name in (model, baseline)
        if len({*_figures(task, model), *_figures(task, baseline)}) > 1
    }
    return sorted(next(iter(sides))) if len(sides) == 1 else []


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _written(change: Change) -> str:
    spread = "" if change.spread is None else f" ± {change.spread:.2f}"
    return f"{change.mean:+.2f}{spread}"
