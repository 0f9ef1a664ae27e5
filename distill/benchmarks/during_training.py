"""Benchmarks of a student while it trains.

They measure a copy of the student as a checkpoint of that step would export it: the moving average
where there is one. The training itself is not changed: a run with benchmarks ends with the same
bits as one without.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data.labelled.digest import same_data
from data.text import as_path
from distill.benchmarks.build import AnyBenchmark, build_benchmark, measure_into
from distill.benchmarks.examine import KEPT, examine
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS
from distill.runtime.generators import generators_kept
from distill.runtime.tracking import Tracker, log, read_metrics
from teachers.config import StrictConfig
from teachers.messages import did_you_mean
from teachers.teacher import Teacher


class TrainingBenchmarksConfig(StrictConfig):
    """The benchmarks of a training run.

    Attributes:
        every: optimiser steps between two measurements. The last step is measured too, and the
            start of a run, so that missing data are reported at once. A checkpoint is written
            before each, as a request to stop ends them at once.
        run: name to benchmark.
        seed: of the probes, independent of the run's own.
        accepted_data: benchmarks that are run although their data are judged to give meaningless
            figures; see docs/checks.md.
    """

    every: PositiveInt
    run: Annotated[
        dict[Annotated[str, Field(pattern=r"^[\w-]+$")], AnyBenchmark], Field(min_length=1)
    ]
    seed: NonNegativeInt = 0
    accepted_data: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _accepts_its_own(self) -> Self:
        for name in self.accepted_data:
            if name not in self.run:
                raise ValueError(
                    f"accepted_data: there is no benchmark {name!r}{did_you_mean(name, self.run)}; "
                    f"there are {', '.join(self.run)}"
                )
        return self


def examine_data(config: TrainingBenchmarksConfig, folder: Path | None) -> None:
    """Examines the data of all benchmarks, before teachers are loaded; every rank calls this.

    Says so where they are other data than those of earlier steps of the run.

    Args:
        config: of the benchmarks.
        folder: of the run; `benchmarks/NAME/data.json` in it has what was found. None to keep
            nothing.

    Raises:
        DataError: data are missing, or would give meaningless figures.
    """
    kept = None if folder is None else folder / "benchmarks"
    before = {name: _kept_data(kept, name) for name in config.run}
    found = examine(
        {name: build_benchmark(each) for name, each in config.run.items()},
        kept,
        where="benchmarks.run",
        overrule="benchmarks.accepted_data",
        accepted=config.accepted_data,
    )
    for name, then in before.items():
        now = found[name]
        if then is not None and now is not None and not same_data(then, now):
            log.warning(
                "benchmarks.run.%s: its data have changed since the run began; figures of earlier "
                "steps are of the old data",
                name,
            )


def check_encoder(config: TrainingBenchmarksConfig, encoder: Teacher) -> None:
    """Checks that a student fits all benchmarks, before anything that takes long.

    Args:
        config: of the benchmarks.
        encoder: the student, on the meta device.

    Raises:
        TeacherError: it does not; names the benchmark.
    """
    for name, each in config.run.items():
        try:
            with suppress(NotImplementedError, RuntimeError):  # what cannot run without storage
                build_benchmark(each).check(encoder)
        except USER_ERRORS as error:
            raise type(error)(f"benchmarks.run.{name}: {error}") from error


def _kept_data(folder: Path | None, name: str) -> dict[str, Any] | None:
    if folder is None:
        return None
    path = folder / as_path(name) / KEPT
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["data"]
        return kept if {"times", "contents"} <= kept.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
        return None


class TrainingBenchmarks:
    """Measures a student that is being trained.

    Args:
        config: of the benchmarks.
        encoder: copies the student in its present state; called by every rank.
        folder: of the run; `benchmarks/NAME/step-N` in it gets pictures and probes.
        num_steps: of the whole run.
    """

    def __init__(
        self,
        config: TrainingBenchmarksConfig,
        encoder: Callable[[], Teacher],
        folder: Path,
        num_steps: int,
    ) -> None:
        self._config, self._encoder = config, encoder
        self._folder, self._num_steps = folder, num_steps

    def due(self, step: int) -> list[str]:
        """The names of the benchmarks to run after a step, on every rank."""
        regular = step % self._config.every == 0 or step == self._num_steps
        steps = self._measured
        return [n for n in self._config.run if step not in steps[n] and (regular or not steps[n])]

    def measure(self, names: Sequence[str], step: int, tracker: Tracker) -> None:
        """Runs benchmarks on the student in its present state; every rank calls this.

        Raises:
            DataError: data of a benchmark are missing.
            TeacherError: the student does not fit a benchmark.
            RecipeError: a probe cannot be trained.
        """
        with generators_kept():
            encoder = self._encoder()
            for name in names:
                self._measure(name, step, encoder, tracker)

    def _measure(self, name: str, step: int, encoder: Teacher, tracker: Tracker) -> None:
        folder = self._folder / "benchmarks" / as_path(name) / f"step-{step:08d}"
        benchmark = build_benchmark(self._config.run[name])
        try:
            metrics = measure_into(benchmark, encoder, self._config.seed, folder).metrics
        except USER_ERRORS as error:
            raise type(error)(f"benchmarks.run.{name}: {error}") from error
        tracker.metrics(step, {f"eval/{name}/{key}": value for key, value in metrics.items()})
        for path in sorted(folder.glob("*.png")):
            tracker.picture(step, f"eval/{name}/{path.stem}", path)
        self._measured[name].add(step)

    @cached_property
    def _measured(self) -> dict[str, set[int]]:
        """The steps at which each benchmark was run, including those before a resume."""
        lines = []
        if distributed.rank() == 0 and (self._folder / "metrics.jsonl").exists():
            lines = [(set(line), line["step"]) for line in read_metrics(self._folder)]
        lines = distributed.broadcast_object(lines)
        return {
            name: {step for keys, step in lines if any(k.startswith(f"eval/{name}/") for k in keys)}
            for name in self._config.run
        }
