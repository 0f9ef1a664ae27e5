"""Benchmarks of a student while it trains.

They measure a copy of the student as a checkpoint of that step would export it: the moving average
where there is one. The training itself is not changed: a run with benchmarks ends with the same
bits as one without.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from data.text import as_path
from distill.benchmarks.build import AnyBenchmark, build_benchmark, measure_into
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS
from distill.runtime.generators import generators_kept
from distill.runtime.tracking import Tracker, read_metrics
from teachers.config import StrictConfig
from teachers.teacher import Teacher


class TrainingBenchmarksConfig(StrictConfig):
    """The benchmarks of a training run.

    Attributes:
        every: optimiser steps between two measurements. The last step is measured too, and the
            start of a run, so that missing data are reported at once.
        run: name to benchmark.
        seed: of the probes, independent of the run's own.
    """

    every: PositiveInt
    run: Annotated[
        dict[Annotated[str, Field(pattern=r"^[\w-]+$")], AnyBenchmark], Field(min_length=1)
    ]
    seed: NonNegativeInt = 0


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
