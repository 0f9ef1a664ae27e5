"""Checks all models of a suite before the first is measured."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from distill.benchmarks.benchmark import Benchmark
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS
from teachers.build import build_teacher
from teachers.fingerprint import teacher_fingerprint
from teachers.messages import hushed
from teachers.teacher import Teacher, TeacherConfig
from teachers.weights import without_storage


class CheckedModel(NamedTuple):
    """A model that can be built: its fingerprint, and itself if it is the only one."""

    fingerprint: str
    encoder: Teacher | None


def check_models(
    models: Mapping[str, TeacherConfig], benchmarks: Mapping[str, Benchmark]
) -> dict[str, CheckedModel]:
    """Builds every model once, with its weights, on the CPU, and asks every benchmark if it fits.

    Only one is in memory at a time.

    Raises:
        TeacherError: a model cannot be built, or does not fit a benchmark; names both.
        RecipeError: the run of a student has no checkpoint.
    """
    checked = {}
    for name, config in models.items():
        try:
            with hushed(distributed.rank() > 0):
                encoder = build_teacher(config, device=torch.device("cpu"))
            fingerprint = teacher_fingerprint(encoder)
        except USER_ERRORS as error:
            raise type(error)(f"models.{name}: {error}") from error
        _check_fits(name, encoder, benchmarks)
        checked[name] = CheckedModel(fingerprint, encoder if len(models) == 1 else None)
    return checked


def _check_fits(name: str, encoder: Teacher, benchmarks: Mapping[str, Benchmark]) -> None:
    try:
        shapes: Teacher = without_storage(encoder)
    except Exception:  # a user's own class may hold what cannot be copied
        shapes = encoder
    for benchmark_name, benchmark in benchmarks.items():
        try:
            benchmark.check(shapes)
        except USER_ERRORS as error:
            place = f"models.{name} does not fit benchmarks.{benchmark_name}"
            raise type(error)(f"{place}: {error}") from error
        except (NotImplementedError, RuntimeError):
            if shapes is encoder:
                raise
            # Some networks cannot run without storage; the benchmark itself tells what is wrong.
