"""Runs benchmarks on encoders: `task: benchmarks`.

Every benchmark measures every encoder with every seed. Measurements that exist, with the same
entries and the same weights, are not repeated, so that a suite that was stopped continues.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)

from data.files import read_json_lines, write_json_lines
from data.text import as_path, shown
from distill.benchmarks.benchmark import Benchmark, metric_key
from distill.benchmarks.build import BENCHMARKS, AnyBenchmark, build_benchmark, measure_into
from distill.evaluation.models import parse_model
from distill.evaluation.relative_change import require_known, split_task
from distill.runtime import distributed
from distill.runtime.run_folder import versions
from teachers.build import build_teacher
from teachers.config import StrictConfig
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher, TeacherConfig

RESULTS = "results.jsonl"
# The keys by which a measurement is found again.
_IDENTITY = ("benchmark", "model", "seed", "entry", "encoder", "fingerprint")

TaskGroups = dict[str, Annotated[tuple[str, ...], Field(min_length=1)]]
AnyModel = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_model)]


class SuiteRecipe(StrictConfig):
    """Encoders and benchmarks.

    Attributes:
        dir: the folder for `results.jsonl`, pictures and the report.
        models: name to model, see `models.parse_model`.
        benchmarks: name to benchmark.
        seeds: seeds of probes and of everything else that is random; a benchmark without
            randomness runs with the first one.
        baseline: the model that relative changes are computed against; None for no such table.
        groups: groups of tasks, see `relative_change.relative_changes`.
    """

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
            raise ValueError("groups are compared with a baseline; add baseline=MODEL")
        return groups


def run_suite(recipe: SuiteRecipe) -> list[dict[str, Any]]:
    """Measures everything that is not measured yet, into `recipe.dir`.

    Returns:
        The rows of `results.jsonl` that the recipe asks for, in its order. To allow measuring it
        again, a row has the metrics, the protocol, both entries with all defaults, the fingerprint
        of the weights and the versions.

    Raises:
        TeacherError: an encoder cannot be built, or a benchmark cannot measure it.
        DataError: the data of a benchmark do not exist.
    """
    recipe.dir.mkdir(parents=True, exist_ok=True)
    known = read_results(recipe.dir)
    rows = []
    for name, config in recipe.models.items():
        encoder = build_teacher(config, device=distributed.device())
        facts = {"model": name, "encoder": config.model_dump(mode="json")}
        facts["fingerprint"] = teacher_fingerprint(encoder)
        for benchmark_name, seed, benchmark in _jobs(recipe):
            job = facts | {
                "benchmark": benchmark_name,
                "entry": benchmark.config.model_dump(mode="json"),
                "seed": seed,
            }
            row = _find(known, job)
            if row is None:
                row = job | _measure(benchmark, encoder, job, row_folder(recipe.dir, job))
                known = [old for old in known if not _replaces(row, old)] + [row]
                if distributed.rank() == 0:
                    write_json_lines(recipe.dir / RESULTS, known)
            rows.append(row)
    return rows


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's `results.jsonl`; none if nothing was measured yet."""
    return [_updated(row) for row in read_json_lines(folder / RESULTS)]


def _updated(row: dict[str, Any]) -> dict[str, Any]:
    """A row with today's names: older versions wrote `AP small`, and a class for `pixels`."""
    if row["encoder"]["kind"] == "distill.evaluation.models:Pixels":
        row["encoder"]["kind"] = "pixels"
    if not BENCHMARKS.is_built_in(row["entry"]["kind"]):
        return row
    return row | {
        "figures": {metric_key(key): value for key, value in row["figures"].items()},
        "lower_is_better": [metric_key(key) for key in row["lower_is_better"]],
    }


def row_folder(folder: Path, row: Mapping[str, Any]) -> Path:
    """The folder with the pictures of one row of the results, in the folder of the suite."""
    return folder / as_path(row["benchmark"]) / as_path(row["model"]) / f"seed-{row['seed']}"


def _jobs(recipe: SuiteRecipe) -> Iterator[tuple[str, int, Benchmark]]:
    for name, config in recipe.benchmarks.items():
        benchmark = build_benchmark(config)
        for seed in recipe.seeds if benchmark.seeded else recipe.seeds[:1]:
            yield name, seed, benchmark


def _measure(
    benchmark: Benchmark, encoder: Teacher, job: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    if distributed.rank() == 0:
        print(f"{shown(job['benchmark'])}: {shown(job['model'])}, seed {job['seed']}", flush=True)
    metrics, protocol = measure_into(benchmark, encoder, job["seed"], folder)
    return {
        "figures": metrics,
        "lower_is_better": sorted(benchmark.lower_is_better & metrics.keys()),
        "protocol": protocol,
        "versions": versions(),
    }


def _find(rows: list[dict[str, Any]], job: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == job[key] for key in _IDENTITY)), None)


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return all(new[key] == old[key] for key in ("benchmark", "model", "seed"))
