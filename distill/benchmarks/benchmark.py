"""The interface of a benchmark: it takes an encoder, and returns metrics and their protocol.

Every encoder is a `Teacher`, including a student's backbone or one of its heads
(`distill.evaluation.models`). To add a benchmark, subclass `Benchmark` in a file of your own and
name it by import path, `kind: my_package.module:MyBenchmark`; nothing here needs an edit.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel

from data.labelled.survey import FilesSurvey, Survey
from teachers.config import StrictConfig
from teachers.teacher import Teacher


class BenchmarkConfig(StrictConfig):
    """The recipe entry of a benchmark; a benchmark with options subclasses it.

    Attributes:
        kind: a built-in name, or the import path `package.module:Class` of your own class.
    """

    kind: str


class Measurement(NamedTuple):
    """The result of one encoder.

    Attributes:
        metrics: name, in snake_case, to value; the first is the one that a report shows where
            there is room for only one.
        protocol: facts that must be equal for metrics to be comparable and are not in the recipe
            entry: numbers of images, resolved sizes, the grid of the truth. Reports refuse rows
            with different protocols, so it holds no results.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


def metric_key(name: str) -> str:
    """A metric's name in snake_case; older versions wrote `AP small` for `ap_small`."""
    return re.sub(r"[\s,:]+", "_", name.lower())


def _paths_in(value: Any) -> Iterator[Path]:
    """The paths in a config, however deep."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths_in(getattr(value, name))
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _paths_in(each)


class Benchmark(ABC):
    """Measures encoders on one task.

    Every rank calls `measure`, and all ranks return the same metrics.

    Attributes:
        lower_is_better: the names of metrics that are errors.
        seeded: whether metrics depend on the seed; if not, only one seed is measured.
    """

    Config: ClassVar[type[BenchmarkConfig]] = BenchmarkConfig
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    seeded: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Builds the benchmark from its `Config`; reads no image."""
        return cls(config)

    def survey(self) -> Survey | None:
        """What `measure` reads, to be listed, counted and judged before any model is built.

        By default all files at the paths of the config, so that a change of them is noticed. None
        for a benchmark without such paths: then figures are kept whatever it reads.

        Raises:
            DataError: data are missing; the message shows the expected tree.
        """
        paths = [path for path in _paths_in(self.config) if path.exists()]
        return FilesSurvey(paths) if paths else None

    def check(self, encoder: Teacher) -> None:
        """Checks that an encoder fits, before any model is measured; encodes nothing.

        Args:
            encoder: frozen; its weights may be on the meta device.

        Raises:
            TeacherError: it does not fit; the message has the cure.
        """
        return

    @abstractmethod
    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Measures one encoder.

        Args:
            encoder: frozen, on this process's device; maps images in [0, 1] to `Features`.
            seed: of all random numbers.
            folder: exists; for pictures (the report shows `*.png`), weights of probes and the like.
                Only rank 0 writes to it.

        Raises:
            DataError: data are missing; the message shows the expected tree.
            TeacherError: the encoder does not fit the benchmark; the message has the cure.
        """
