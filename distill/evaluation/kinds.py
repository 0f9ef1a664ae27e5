"""Kinds that only evaluation knows, entered when a command starts."""

from distill.benchmarks.build import BENCHMARKS
from distill.tasks.kinds import register_kinds
from teachers.build import TEACHERS


def register_evaluation_kinds() -> None:
    """Lets suites name what `register_kinds` adds, `kind: pixels` and `kind: resolution_sweep`."""
    register_kinds()
    TEACHERS.register("pixels", "distill.evaluation.models:Pixels")
    BENCHMARKS.register("resolution_sweep", "distill.evaluation.resolution_sweep:ResolutionSweep")
