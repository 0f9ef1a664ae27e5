"""Registers the kinds that only evaluations have, when a command starts."""

from distill.benchmarks.build import BENCHMARKS
from distill.tasks.kinds import register_kinds
from teachers.build import TEACHERS


def register_evaluation_kinds() -> None:
    """Registers `pixels`, `resolution_sweep` and the kinds of `register_kinds`."""
    register_kinds()
    TEACHERS.register("pixels", "distill.evaluation.models:Pixels")
    BENCHMARKS.register("resolution_sweep", "distill.evaluation.resolution_sweep:ResolutionSweep")
