"""One table of all that ships: teachers, upsampled ones, the student in the box, and baselines.

    python -m tests.quality.suite --data DATA [--out OUT] [--models lite2] [--benchmarks camvid]

The benchmarks are those of `recipes/evaluation/`, on the sets in DATA, with a linear probe where
something is trained, and three seeds there. Every measurement is kept in OUT by the suites of
`distill.evaluate`, so that the same command goes on where it was stopped. Prints the table in
Markdown; OUT/suite.json has the figures.

An upsampler changes no summary: upsampled teachers have the kNN of their encoder. A teacher without
a summary (`vit_s`) is read by the mean of its map, as `distill.evaluate` does. Delta_m is the mean
relative change over the columns before it against the best single teacher of each column, as in
`distill.evaluation.relative_change`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.evaluation.kinds import register_evaluation_kinds
from distill.evaluation.relative_change import require_known
from distill.evaluation.suite import SuiteRecipe, run_suite
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from teachers.compact_text import FILE as TEXT_FILE
from teachers.files import SHIPPED
from tests.quality.suite_rows import (
    COLUMNS,
    STUDENT,
    TEXTS,
    Entry,
    benchmark_of,
    encoder_of,
    is_here,
    models,
    zero_shot_of,
)
from tests.quality.suite_table import (
    Rows,
    best_teacher,
    costs,
    markdown,
    shared_summaries,
    summarised,
)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality.suite")
    parser.add_argument("--data", type=Path, required=True, help="the folder of all sets")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="where results are")
    parser.add_argument("--models", help="names of rows, with commas; all without")
    parser.add_argument("--benchmarks", help="names of columns, with commas; all without")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    data, every = options.data.resolve(), models(options.data.resolve())
    try:
        names = _chosen("--models", options.models, every)
        columns = _chosen("--benchmarks", options.benchmarks, [*COLUMNS, *TEXTS])
    except RecipeError as error:
        parser.error(str(error))
    register_evaluation_kinds()
    rows = {name: every[name] for name in names if name != STUDENT or is_here(every[name])}
    results = measure(rows, columns, data, options.out, options.seeds)
    results = shared_summaries(results, rows, data)
    columns = [each for each in columns if any(row["benchmark"] == each for row in results)]
    prices = costs(rows, options.out / "costs.json")
    lines = summarised(results, rows, columns, data, prices)
    (options.out / "suite.json").write_text(json.dumps(lines, indent=1))
    print(f"\n{markdown(lines, columns)}")
    best = {each: best_teacher(results, each, data) for each in columns if each in COLUMNS}
    named = ", ".join(f"{column}: {teacher or 'none'}" for column, teacher in best.items())
    print(f"\nBest single teacher of each column: {named}.")
    return 0


def _chosen(
    option: str, asked: str | None, known: Mapping[str, Entry] | Sequence[str]
) -> list[str]:
    names = list(known) if asked is None else asked.split(",")
    for name in names:
        require_known(option, name, known, "name")
    return [name for name in known if name in names]


def measure(
    rows: Mapping[str, Entry], chosen: Sequence[str], data: Path, out: Path, seeds: Sequence[int]
) -> Rows:
    """Runs the suites: one of maps, one of summaries, and one for each text tower."""
    found: Rows = []
    for of_map in (True, False):
        benchmarks = {
            name: benchmark_of(column, data)
            for name, column in COLUMNS.items()
            if name in chosen and column.of_map == of_map
        }
        seen = {n: e for n, e in rows.items() if of_map or encoder_of(n, data) == n}
        found += suite(out / ("maps" if of_map else "summaries"), seen, benchmarks, seeds)
    for column in (each for each in TEXTS if each in chosen):
        name, text = TEXTS[column]
        if not (SHIPPED / text / TEXT_FILE).is_file():
            print(f"{column}: left out: {text} has no text tower", flush=True)
            continue
        seen = {name: rows[name]} if name in rows else {}
        head = rows.get(STUDENT, {}) | {"head": name}
        if STUDENT in rows and is_here(head):
            seen[STUDENT] = head
        found += suite(out / column, seen, {column: zero_shot_of(text, data)}, seeds)
    return found


def suite(
    folder: Path, rows: Mapping[str, Entry], benchmarks: Mapping[str, Entry], seeds: Sequence[int]
) -> Rows:
    """The results of some models on some benchmarks; measures what is missing."""
    if not rows or not benchmarks:
        return []
    tree = {
        "task": "benchmarks",
        "dir": str(folder),
        "models": dict(rows),
        "benchmarks": dict(benchmarks),
        "seeds": list(seeds),
    }
    return run_suite(validate(SuiteRecipe, tree, "tests.quality.suite"))


if __name__ == "__main__":
    sys.exit(main())
