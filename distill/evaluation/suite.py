"""Runs benchmarks on encoders: `task: benchmarks`.

Every encoder meets every benchmark, once a seed. What was measured before, with the same entries
and the same weights, is not measured again: a suite that was stopped goes on.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)

from data.files import write_text
from distill.benchmarks.benchmark import Benchmark, metric_key
from distill.benchmarks.build import BENCHMARKS, AnyBenchmark, build_benchmark, measure_into
from distill.evaluation.models import parse_model
from distill.evaluation.report import require_known, split_task
from distill.runtime import distributed
from distill.runtime.run_folder import versions
from teachers.build import build_teacher
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher, TeacherConfig

RESULTS = "results.jsonl"
_SAME = ("benchmark", "model", "seed", "entry", "encoder", "fingerprint")

TaskGroups = dict[str, Annotated[tuple[str, ...], Field(min_length=1)]]
AnyModel = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_model)]


class SuiteRecipe(BaseModel):
    """Encoders and benchmarks.

    Attributes:
        dir: the folder for `results.jsonl`, pictures and the report.
        models: name to what is measured, see `models.parse_model`.
        benchmarks: name to benchmark.
        seeds: of probes and whatever else is random; a benchmark that is not takes the first.
        baseline: the model that the others' relative changes are against; None for no table of
            them.
        groups: of tasks, see `report.relative_changes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["benchmarks"]
    dir: Path
    models: Annotated[dict[str, AnyModel], Field(min_length=1)]
    benchmarks: Annotated[dict[str, AnyBenchmark], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    baseline: str | None = None
    groups: TaskGroups = {}

    @field_validator("baseline")
    @classmethod
    def _is_measured(cls, baseline: str | None, info: ValidationInfo) -> str | None:
        if baseline is not None and "models" in info.data:
            require_known("models", baseline, info.data["models"], "model")
        return baseline

    @field_validator("groups")
    @classmethod
    def _are_measured(cls, groups: TaskGroups, info: ValidationInfo) -> TaskGroups:
        for group, items in groups.items():
            for item in items if "benchmarks" in info.data else ():
                split_task(group, item, info.data["benchmarks"])
        if groups and info.data.get("baseline", "") is None:
            raise ValueError("changes are of groups against a baseline; name it, baseline=MODEL")
        return groups


def run_suite(recipe: SuiteRecipe) -> list[dict[str, Any]]:
    """Measures whatever is not measured yet.

    Args:
        recipe: `recipe.dir` is made where it is not there.

    Returns:
        The lines of `results.jsonl` that the recipe asks for, in its order. A line has the
        figures, the protocol, both entries with all defaults, the fingerprint of the weights and
        the versions: all that is needed to measure it again.

    Raises:
        TeacherError: an encoder cannot be built, or cannot be measured so.
        DataError: a benchmark's data are not there.
    """
    recipe.dir.mkdir(parents=True, exist_ok=True)
    known = read_results(recipe.dir)
    rows = []
    for name, config in recipe.models.items():
        encoder = build_teacher(config, device=distributed.device())
        facts = {"model": name, "encoder": config.model_dump(mode="json")}
        facts["fingerprint"] = teacher_fingerprint(encoder)
        for benchmark_name, seed, benchmark in _jobs(recipe):
            due = facts | {
                "benchmark": benchmark_name,
                "entry": benchmark.config.model_dump(mode="json"),
                "seed": seed,
            }
            row = _find(known, due)
            if row is None:
                row = due | _measure(benchmark, encoder, seed, row_folder(recipe.dir, due))
                known = [old for old in known if not _replaces(row, old)] + [row]
                _write(recipe.dir, known)
            rows.append(row)
    return rows


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's `results.jsonl`; none where nothing was measured yet."""
    path = folder / RESULTS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [_with_metric_keys(json.loads(line)) for line in lines]


def _with_metric_keys(row: dict[str, Any]) -> dict[str, Any]:
    """A line with the metric names of today: built-in benchmarks once wrote `AP small`."""
    if not BENCHMARKS.is_built_in(row["entry"]["kind"]):
        return row
    return row | {
        "figures": {metric_key(key): value for key, value in row["figures"].items()},
        "lower_is_better": [metric_key(key) for key in row["lower_is_better"]],
    }


def row_folder(folder: Path, row: Mapping[str, Any]) -> Path:
    """Where a suite keeps the pictures of a line of its results.

    Args:
        folder: the suite's.
        row: the line.
    """
    return folder / row["benchmark"] / row["model"] / f"seed-{row['seed']}"


def _jobs(recipe: SuiteRecipe) -> Iterator[tuple[str, int, Benchmark]]:
    for name, config in recipe.benchmarks.items():
        benchmark = build_benchmark(config)
        for seed in recipe.seeds if benchmark.seeded else recipe.seeds[:1]:
            yield name, seed, benchmark


def _measure(benchmark: Benchmark, encoder: Teacher, seed: int, folder: Path) -> dict[str, Any]:
    if distributed.rank() == 0:
        print(f"{folder.parent.parent.name}: {folder.parent.name}, seed {seed}", flush=True)
    figures, protocol = measure_into(benchmark, encoder, seed, folder)
    return {
        "figures": figures,
        "lower_is_better": sorted(benchmark.lower_is_better & figures.keys()),
        "protocol": protocol,
        "versions": versions(),
    }


def _find(rows: list[dict[str, Any]], due: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == due[key] for key in _SAME)), None)


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return all(new[key] == old[key] for key in ("benchmark", "model", "seed"))


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    if distributed.rank() == 0:
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_text(folder / RESULTS, "".join(lines))
