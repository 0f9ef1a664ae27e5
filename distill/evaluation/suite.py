"""Runs benchmarks on encoders: `task: benchmarks`.

Every benchmark measures every encoder with every seed. Measurements that exist, with the same
entries, weights and data, are not repeated, so that a suite that was stopped continues.
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

from data.errors import DataError
from data.files import read_json_lines, write_json_lines
from data.labelled.digest import DigestMode
from data.text import as_path, shown
from distill.benchmarks.benchmark import Benchmark, metric_key
from distill.benchmarks.build import BENCHMARKS, AnyBenchmark, build_benchmark, measure_into
from distill.benchmarks.dense.unaugmented import stated_as_cached
from distill.benchmarks.examine import examine
from distill.evaluation.kept import find_kept, now_text, written_at
from distill.evaluation.model_checks import check_models
from distill.evaluation.models import parse_model
from distill.evaluation.relative_change import require_known, split_task
from distill.runtime import distributed
from distill.runtime.run_folder import versions
from teachers.build import build_teacher
from teachers.config import StrictConfig
from teachers.teacher import Teacher, TeacherConfig

RESULTS = "results.jsonl"

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
        accepted_data: benchmarks that are measured although their data are judged to give
            meaningless figures; see docs/checks.md.
        data_digest: what identifies data: `times` of files, beside their names and sizes; their
            `contents`, which copies share; or `auto`, contents of sets up to 2 GB.
    """

    task: Literal["benchmarks"]
    dir: Path
    models: Annotated[dict[str, AnyModel], Field(min_length=1)]
    benchmarks: Annotated[dict[str, AnyBenchmark], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    baseline: str | None = None
    groups: TaskGroups = {}
    accepted_data: tuple[str, ...] = ()
    data_digest: DigestMode = "auto"

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        twice = [seed for seed in seeds if seeds.count(seed) > 1]
        if twice:
            raise ValueError(f"{twice[0]} occurs twice; one measurement has no spread")
        return seeds

    @field_validator("baseline")
    @classmethod
    def _is_measured(cls, baseline: str | None, info: ValidationInfo) -> str | None:
        if baseline is not None and "models" in info.data:
            require_known("models", baseline, info.data["models"], "model")
        return baseline

    @field_validator("accepted_data")
    @classmethod
    def _are_benchmarks(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for name in names if "benchmarks" in info.data else ():
            require_known("benchmarks", name, info.data["benchmarks"], "benchmark")
        return names

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
    # Everything that is read is looked at before anything is measured: data, then models.
    recipe.dir.mkdir(parents=True, exist_ok=True)
    all_written_at = written_at(recipe.dir)
    benchmarks = {name: build_benchmark(config) for name, config in recipe.benchmarks.items()}
    accepted, mode = recipe.accepted_data, recipe.data_digest
    data = examine(benchmarks, recipe.dir, accepted=accepted, mode=mode)
    checked = check_models(recipe.models, benchmarks)
    known = read_results(recipe.dir)
    rows = []
    for name, config in recipe.models.items():
        encoder = checked[name].encoder
        facts = {"model": name, "encoder": config.model_dump(mode="json")}
        facts["fingerprint"] = checked[name].fingerprint
        for benchmark_name, seed, benchmark in _jobs(recipe):
            job = facts | {
                "benchmark": benchmark_name,
                "entry": benchmark.config.model_dump(mode="json"),
                "seed": seed,
                "data": data[benchmark_name],
            }
            folder = row_folder(recipe.dir, job)
            row, note = find_kept(known, job, written_at(folder) or all_written_at)
            _say(job, f"{note}, {shown(recipe.dir / RESULTS)}" if row is not None else note)
            if row is None:
                encoder = _placed(encoder, config)
                row = job | _measure(benchmark, encoder, seed, folder)
            updated = _with(known, row)
            if updated != known and distributed.rank() == 0:
                write_json_lines(recipe.dir / RESULTS, updated)
            known = updated
            rows.append(row)
    return rows


def _placed(encoder: Teacher | None, config: TeacherConfig) -> Teacher:
    """The model on this process's device: as it was built for the check, or built now."""
    device = distributed.device()
    return build_teacher(config, device=device) if encoder is None else encoder.to(device)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's `results.jsonl`; none if nothing was measured yet.

    Raises:
        DataError: a line is no row of results.
    """
    rows = []
    for number, row in enumerate(read_json_lines(folder / RESULTS), 1):
        try:
            rows.append(_updated(row))
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"'{folder / RESULTS}', line {number}: no row of results ({error!r}); mend or "
                "remove the line"
            ) from error
    return rows


def _updated(row: dict[str, Any]) -> dict[str, Any]:
    """A row with today's names: older versions wrote `AP small`, and a class for `pixels`."""
    if row["encoder"]["kind"] == "distill.evaluation.models:Pixels":
        row["encoder"]["kind"] = "pixels"
    if not BENCHMARKS.is_built_in(row["entry"]["kind"]):
        return row
    if isinstance(probe := row["entry"].get("probe"), dict):  # older versions withheld nothing
        row["entry"]["probe"] = {"withheld": 0.0} | probe
    if row["entry"]["kind"] == "knn":  # older versions classified test images only
        row["entry"] = {"split": "test"} | row["entry"]
    return stated_as_cached(row) | {
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


def _say(job: Mapping[str, Any], note: str) -> None:
    if distributed.rank() == 0:
        line = f"{shown(job['benchmark'])}: {shown(job['model'])}, seed {job['seed']}"
        print(f"{line}: {note}" if note else line, flush=True)


def _measure(benchmark: Benchmark, encoder: Teacher, seed: int, folder: Path) -> dict[str, Any]:
    metrics, protocol = measure_into(benchmark, encoder, seed, folder)
    return {
        "figures": metrics,
        "lower_is_better": sorted(benchmark.lower_is_better & metrics.keys()),
        "protocol": protocol,
        "versions": versions(),
        "measured": now_text(),
    }


def _with(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with one more, in the place of the row of the same measurement if there is one."""
    keys = ("benchmark", "model", "seed")
    found = [row if all(row[key] == old[key] for key in keys) else old for old in rows]
    return found if any(each is row for each in found) else [*rows, row]
