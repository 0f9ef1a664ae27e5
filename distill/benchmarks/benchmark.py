"""What a benchmark is: an encoder in, figures out, with the protocol that they were measured by.

Everything that is measured here is a `Teacher`, a student's backbone or one of its heads too
(`distill.evaluation.models`). To add a benchmark, subclass `Benchmark` in a file of your own and
name it by import path, `kind: my_package.module:MyBenchmark`; nothing here needs an edit.
"""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from teachers.config import StrictConfig
from teachers.teacher import Teacher


class BenchmarkConfig(StrictConfig):
    """What every benchmark's recipe entry has; one with options subclasses it.

    Attributes:
        kind: a built-in name, or the import path `package.module:Class` of a user's class.
    """

    kind: str


class Measurement(NamedTuple):
    """What one encoder reached.

    Attributes:
        metrics: name, in snake_case, to value; the first is the one that a report shows where
            there is room for only one.
        protocol: what has to be equal for figures to be comparable, and is not written in the
            recipe's entry: numbers of images, resolved sizes, the grid that was counted on. A
            report refuses rows that differ in it, so nothing that was found stands here.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


def metric_key(name: str) -> str:
    """A metric's name in snake_case; older versions wrote `AP small` for `ap_small`."""
    return re.sub(r"[\s,:]+", "_", name.lower())


class Benchmark(ABC):
    """Measures encoders on one task.

    Under several ranks every rank calls `measure` and all of them return the same figures.

    Attributes:
        lower_is_better: the names of figures that are errors.
        seeded: whether figures depend on the seed; where not, one seed is measured.
    """

    Config: ClassVar[type[BenchmarkConfig]] = BenchmarkConfig
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    seeded: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Builds the benchmark from its `Config`, without reading any image."""
        return cls(config)

    @abstractmethod
    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Measures one encoder.

        Args:
            encoder: frozen, on this process's device; images in [0, 1] to `Features`.
            seed: of everything random.
            folder: there for whatever is worth keeping: pictures (`*.png` reach the report),
                weights of a probe. Rank 0 alone writes into it.

        Raises:
            DataError: the data are not there, with the tree that is expected.
            TeacherError: the encoder cannot be measured so; says what to change.
        """
