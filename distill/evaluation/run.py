"""Runs the evaluation that the `task` of a recipe names: the work of `distill.evaluate`."""

from pathlib import Path

from rich.console import Console

from data.text import printable
from distill.evaluation.comparison import (
    ComparisonRecipe,
    compare,
    comparison_table,
    evaluate_upsampler,
)
from distill.evaluation.models import model_of
from distill.evaluation.relative_change import change_table, relative_changes
from distill.evaluation.report_page import write_report
from distill.evaluation.results import ReportRecipe, Result, read_suites, results_tables
from distill.evaluation.student_run import agreement_table, evaluate_student
from distill.evaluation.suite import RESULTS, SuiteRecipe, run_suite
from distill.evaluation.throughput import ThroughputRecipe, measure_throughput
from distill.evaluation.throughput_report import throughput_table
from distill.runtime import distributed
from distill.runtime.config import apply_overrides, load_recipe, load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import make_folder
from distill.tasks.trained import find_trained, recipe_file
from teachers.messages import did_you_mean

_TIMEOUT_S = 7200.0  # for which ranks wait for the slowest one


def evaluate(target: str, overrides: list[str], suite: Path | None = None) -> None:
    """Measures a target, prints the tables and writes results, pictures and pages.

    Args:
        target: a recipe, the folder of a run, or one of its checkpoints; with a suite, see
            `models.model_of`.
        overrides: `section.key=value` changes to the recipe, or to the suite.
        suite: a recipe of benchmarks that measures the target beside the suite's baseline.

    Raises:
        RecipeError: no such task, or one that takes a single process runs in several.
    """
    if suite is not None:
        _benchmarks(suite, overrides, target)
        return
    path = Path(target)
    tree = load_yaml(recipe_file(path))
    apply_overrides(tree, overrides)
    task = tree.get("task", "student")
    if task not in _TASKS:
        raise RecipeError(
            f"{path}: task: {task!r} is unknown{did_you_mean(str(task), _TASKS)}; "
            f"choose from {', '.join(_TASKS)}"
        )
    if distributed.world_size() > 1 and task != "benchmarks":
        raise RecipeError(f"task: {task} runs in one process; only benchmarks run in several")
    _TASKS[task](path, overrides)


def _student(target: Path, overrides: list[str]) -> None:
    rows, page = evaluate_student(find_trained(target, overrides))
    Console().print(agreement_table(rows))
    print(printable(f"page: {page}"))


def _upsampler(target: Path, overrides: list[str]) -> None:
    rows, folder = evaluate_upsampler(target, overrides)
    Console().print(comparison_table(rows))
    print(printable(f"pictures: {folder}"))


def _upsamplers(target: Path, overrides: list[str]) -> None:
    recipe = load_recipe(ComparisonRecipe, target, overrides)
    make_folder(recipe.dir, "dir")
    rows = compare(recipe.teacher, recipe.methods, recipe.evaluation, recipe.dir)
    Console().print(comparison_table(rows))
    print(printable(f"pictures: {recipe.dir}"))


def _throughput(target: Path, overrides: list[str]) -> None:
    recipe = load_recipe(ThroughputRecipe, target, overrides)
    make_folder(recipe.dir, "dir")
    rows, crossings = measure_throughput(recipe)
    Console().print(throughput_table(rows, crossings))
    print(printable(f"picture: {recipe.dir / 'throughput.png'}"))


def _benchmarks(target: Path, overrides: list[str], model: str | None = None) -> None:
    tree = load_yaml(target)
    apply_overrides(tree, overrides)
    if model is not None:
        models = tree.get("models") or {}
        kept = {name: models[name] for name in [tree.get("baseline")] if name in models}
        tree["models"] = kept | {Path(model).name: model_of(model)}
        apply_overrides(tree, overrides)  # again: some may change the new entry
    recipe = validate(SuiteRecipe, tree, str(target))
    make_folder(recipe.dir, "dir")
    with distributed.connected(_TIMEOUT_S, recipe.dir):
        rows = run_suite(recipe)
    if distributed.rank() == 0:
        print(printable(f"results: {recipe.dir / RESULTS}"))
        _show(recipe, [Result(recipe.dir, row) for row in rows])


def _report(target: Path, overrides: list[str]) -> None:
    recipe = load_recipe(ReportRecipe, target, overrides)
    make_folder(recipe.dir, "dir")
    _show(recipe, read_suites(recipe.results, recipe.may_differ))


def _show(recipe: SuiteRecipe | ReportRecipe, results: list[Result]) -> None:
    """Prints the tables of some results and writes their page."""
    rows = [result.row for result in results]
    tables = results_tables(rows)
    changes = None
    if recipe.baseline is not None:
        changes = change_table(relative_changes(rows, recipe.baseline, recipe.groups))
    page = write_report(recipe.dir, results, tables, changes)  # before anything is printed
    for table in [*tables, *filter(None, [changes])]:
        Console().print(table.to_rich())
    print(printable(f"page: {page}"))


_TASKS = {
    "benchmarks": _benchmarks,
    "report": _report,
    "student": _student,
    "upsampler": _upsampler,
    "upsamplers": _upsamplers,
    "throughput": _throughput,
}
