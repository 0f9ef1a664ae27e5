"""Measures what was trained: `python -m distill.evaluate TARGET [key=value ...]`.

By the recipe's `task`: a student's agreement with its teachers, an upsampler's fidelity to its
encoder, a comparison of upsamplers, what features cost by resolution, or benchmarks; or brings the
results of several suites of benchmarks into one report. With `--on SUITE` the target is what a
suite measures, beside the suite's baseline. Exit codes: 0 done, 2 a user's
mistake.
"""

import argparse
from pathlib import Path

from rich.console import Console

from distill.display.tables import screen_table
from distill.evaluation.comparison import (
    ComparisonRecipe,
    compare,
    comparison_table,
    evaluate_upsampler,
)
from distill.evaluation.kinds import register_evaluation_kinds
from distill.evaluation.models import model_of
from distill.evaluation.report import change_sheet, relative_changes
from distill.evaluation.report_page import write_report
from distill.evaluation.results import ReportRecipe, Result, read_suites, results_sheets
from distill.evaluation.student_run import agreement_table, evaluate_student
from distill.evaluation.suite import RESULTS, SuiteRecipe, run_suite
from distill.evaluation.throughput import ThroughputRecipe, measure_throughput
from distill.evaluation.throughput_report import throughput_table
from distill.runtime import distributed
from distill.runtime.command import command
from distill.runtime.config import apply_overrides, load_recipe, load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.tasks.trained import find_trained, recipe_file
from teachers.kinds import did_you_mean

_PATIENCE_S = 3600.0  # that ranks wait for the slowest


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.evaluate",
        description="Measure on held-out images how well a student agrees with its teachers before "
        "and after training, how true upsamplers are to their encoder, or what any encoder is "
        "worth on benchmarks. Writes JSON lines and pictures, and a page that shows them.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a recipe (task student, upsampler, upsamplers, throughput, benchmarks or report), "
        "the folder of a run, or one of its checkpoints; with --on also an exported student or a "
        "timm name",
    )
    parser.add_argument(
        "--on",
        type=Path,
        metavar="SUITE",
        help="measure TARGET by this recipe of benchmarks, see recipes/evaluation, beside its "
        "baseline if it names one; overrides are changes to it",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as benchmarks.camvid.dataset.root=PATH or "
        "evaluation.resolutions=[256,[384,512]]; recipes/evaluation/README.md has a command for "
        "each benchmark",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args(arguments)


@command
def main() -> None:
    """The command."""
    register_evaluation_kinds()
    arguments = parse_arguments()
    overrides = arguments.overrides
    if arguments.on is not None:
        _benchmarks(arguments.on, overrides, arguments.target)
        return
    target = Path(arguments.target)
    task = _task(target, overrides)
    if task not in _TASKS:
        raise RecipeError(
            f"{target}: task: {task!r} is unknown{did_you_mean(str(task), _TASKS)}; "
            f"choose from {', '.join(_TASKS)}"
        )
    if distributed.world_size() > 1 and task != "benchmarks":
        raise RecipeError(f"task: {task} is measured by one process; only benchmarks take several")
    _TASKS[task](target, overrides)


def _task(target: Path, overrides: list[str]) -> object:
    tree = load_yaml(recipe_file(target))
    apply_overrides(tree, overrides)
    return tree.get("task", "student")


def _student(target: Path, overrides: list[str]) -> None:
    rows, page = evaluate_student(find_trained(target, overrides))
    Console().print(agreement_table(rows))
    print(f"page: {page}")


def _upsampler(target: Path, overrides: list[str]) -> None:
    rows, folder = evaluate_upsampler(target, overrides)
    Console().print(comparison_table(rows))
    print(f"pictures: {folder}")


def _upsamplers(target: Path, overrides: list[str]) -> None:
    recipe = load_recipe(ComparisonRecipe, target, overrides)
    rows = compare(recipe.teacher, recipe.methods, recipe.evaluation, recipe.dir)
    Console().print(comparison_table(rows))
    print(f"pictures: {recipe.dir}")


def _throughput(target: Path, overrides: list[str]) -> None:
    recipe = load_recipe(ThroughputRecipe, target, overrides)
    rows, crossings = measure_throughput(recipe)
    Console().print(throughput_table(rows, crossings))
    print(f"picture: {recipe.dir / 'throughput.png'}")


def _benchmarks(target: Path, overrides: list[str], model: str | None = None) -> None:
    tree = load_yaml(target)
    apply_overrides(tree, overrides)
    if model is not None:
        models = tree.get("models") or {}
        kept = {name: models[name] for name in [tree.get("baseline")] if name in models}
        tree["models"] = kept | {Path(model).name: model_of(model)}
        apply_overrides(tree, overrides)  # again: some may be of the target's entry
    recipe = validate(SuiteRecipe, tree, str(target))
    recipe.dir.mkdir(parents=True, exist_ok=True)
    with distributed.connected(_PATIENCE_S, recipe.dir):
        rows = run_suite(recipe)
    if distributed.rank() == 0:
        print(f"results: {recipe.dir / RESULTS}")
        _show(recipe, [Result(recipe.dir, row) for row in rows])


def _report(target: Path, overrides: list[str]) -> None:
    recipe = load_recipe(ReportRecipe, target, overrides)
    _show(recipe, read_suites(recipe.results, recipe.may_differ))


def _show(recipe: SuiteRecipe | ReportRecipe, results: list[Result]) -> None:
    """Results on the screen and on a page."""
    rows = [result.row for result in results]
    tables = results_sheets(rows)
    for table in tables:
        Console().print(screen_table(table))
    changes = None
    if recipe.baseline is not None:
        changes = change_sheet(relative_changes(rows, recipe.baseline, recipe.groups))
        Console().print(screen_table(changes))
    print(f"page: {write_report(recipe.dir, results, tables, changes)}")


_TASKS = {
    "benchmarks": _benchmarks,
    "report": _report,
    "student": _student,
    "upsampler": _upsampler,
    "upsamplers": _upsamplers,
    "throughput": _throughput,
}


if __name__ == "__main__":
    main()
