"""Benchmarks while a student trains: curves of what it is worth, beside those of its losses.

What is measured is a copy of the student, as a checkpoint of that step would export it: the moving
average where there is one. Nothing of the training is touched, so a run with benchmarks ends with
the same bits as one without.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from distill.benchmarks.build import AnyBenchmark, build_benchmark, measure_into
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS
from distill.runtime.generators import generators_kept
from distill.runtime.tracking import Tracker, read_metrics
from teachers.config import StrictConfig
from teachers.teacher import Teacher


class TrainingBenchmarksConfig(StrictConfig):
    """What is measured while a student trains, and how often.

    Attributes:
        every: optimiser steps between two measurements. The last step is measured too, and the
            first start of each benchmark: where its data are missing, the run says so at once.
        run: name to benchmark.
        seed: of the probes, whatever the run's own.
    """

    every: PositiveInt
    run: Annotated[
        dict[Annotated[str, Field(pattern=r"^[\w-]+$")], AnyBenchmark], Field(min_length=1)
    ]
    seed: NonNegativeInt = 0


class TrainingBenchmarks:
    """Measures a student that is being trained.

    Args:
        config: what and how often.
        encoder: copies the student as it is; called by every rank.
        folder: the run's; `benchmarks/NAME/step-N` in it gets pictures and probes.
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
        """The names of what is to be measured after a step, on every rank."""
        regular = step % self._config.every == 0 or step == self._num_steps
        steps = self._measured
        return [n for n in self._config.run if step not in steps[n] and (regular or not steps[n])]

    def measure(self, names: Sequence[str], step: int, tracker: Tracker) -> None:
        """Measures the student as it is now; every rank calls this.

        Raises:
            DataError: a benchmark's data are not there.
            TeacherError: the student cannot be measured so.
            RecipeError: a probe cannot be trained so.
        """
        with generators_kept():
            encoder = self._encoder()
            for name in names:
                self._measure(name, step, encoder, tracker)

    def _measure(self, name: str, step: int, encoder: Teacher, tracker: Tracker) -> None:
        folder = self._folder / "benchmarks" / name / f"step-{step:08d}"
        benchmark = build_benchmark(self._config.run[name])
        try:
            figures = measure_into(benchmark, encoder, self._config.seed, folder).metrics
        except USER_ERRORS as error:
            raise type(error)(f"benchmarks.run.{name}: {error}") from error
        tracker.metrics(step, {f"eval/{name}/{key}": value for key, value in figures.items()})
        for path in sorted(folder.glob("*.png")):
            tracker.picture(step, f"eval/{name}/{path.stem}", path)
        self._measured[name].add(step)

    @cached_property
    def _measured(self) -> dict[str, set[int]]:
        """The steps that each benchmark has figures of, those of former starts included."""
        lines = []
        if distributed.rank() == 0 and (self._folder / "metrics.jsonl").exists():
            lines = [(set(line), line["step"]) for line in read_metrics(self._folder)]
        lines = distributed.broadcast_object(lines)
        return {
            name: {step for keys, step in lines if any(k.startswith(f"eval/{name}/") for k in keys)}
            for name in self._config.run
        }
