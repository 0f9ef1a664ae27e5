"""Measures the time that features take by resolution: `task: throughput`.

The time of an image and of a token is measured for an encoder at each size that it accepts and for
upsamplers, beside a hypothetical encoder whose time is proportional to its tokens (Ranzinger et
al., FeatSharp, 2025, arXiv 2502.16025, figure 14). Time does not depend on weights, so teachers may
have `weights: none`, and upsamplers are not trained.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from data.files import write_json_lines
from distill.evaluation.break_even import break_even
from distill.evaluation.throughput_report import draw_throughput
from distill.runtime import distributed
from distill.runtime.processor import measured_precision, warn_of_slow_bf16
from distill.tasks.student_recipe import AnyTeacher
from teachers.build import TEACHERS, build_teacher
from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.phi_s import any_phi_s
from teachers.teacher import Teacher, TeacherConfig
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.resize import Factor, scaled
from teachers.upsamplers.standardised import Standardised

_NATIVE = (1, 1)


class ThroughputRecipe(StrictConfig):
    """The encoders and upsamplers to time.

    Attributes:
        dir: the folder for `throughput.jsonl`, `break_even.jsonl` and `throughput.png`.
        teachers: name to encoder, without an upsampler.
        upsamplers: name to the entry of an upsampler without its factor.
        factors: the factors of each upsampler, each one number or [height, width]; at least two of
            different size.
        batch_size: images of one call.
        rounds: timed calls, of which the median is taken, after one that is not timed.
        precision: of the encoder's weights and of the upsampler's products.
    """

    task: Literal["throughput"]
    dir: Path
    teachers: Annotated[dict[str, AnyTeacher], Field(min_length=1)]
    upsamplers: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    factors: list[Factor] = [(2, 2), (3, 3), (4, 4)]
    batch_size: PositiveInt = 1
    rounds: PositiveInt = 5
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(measured_precision)] = "fp32"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len({fh * fw for fh, fw in self.factors} - {1}) < 2:
            raise ValueError("factors: give at least two of different size above 1, to fit a curve")
        for name, teacher in self.teachers.items():
            if teacher.upsampler is not None:
                raise ValueError(f"teachers.{name}.upsampler: move it to `upsamplers`")
        for name, entry in self.upsamplers.items():
            if "factor" in entry or entry.get("kind") == "trained":
                raise ValueError(f"upsamplers.{name}: expected a kind and options without a factor")
            if name in ("encoder", "linear"):
                raise ValueError(f"upsamplers.{name}: this name is reserved; choose another one")
            parse_upsampler({**entry, "factor": self.factors[0]})
        return self


class Case(NamedTuple):
    """One point of a curve: a model and the size of its images.

    Attributes:
        method: `encoder`, or the name of an upsampler.
        factor: (fh, fw), size of the images relative to the native resolution.
        teacher: the model to call.
        passes: passes of the encoder at its native resolution; None for the encoder at another.
    """

    method: str
    factor: tuple[int, int]
    teacher: Teacher
    passes: int | None


def measure_throughput(
    recipe: ThroughputRecipe,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures the times and writes them, with a picture of the curves.

    Returns:
        The rows of `throughput.jsonl` and of `break_even.jsonl`; the latter only has teachers that
        accept larger images.

    Raises:
        TeacherError: a teacher or one of its upsamplers cannot be built.
    """
    for name, config in recipe.teachers.items():
        _check(name, config, recipe)
    warn_of_slow_bf16({"precision": recipe.precision})
    rows: list[dict[str, Any]] = []
    crossings: list[dict[str, Any]] = []
    for name, config in recipe.teachers.items():
        measured = _measure(name, config, recipe)
        rows += measured
        crossings += _break_evens(name, measured)
    recipe.dir.mkdir(parents=True, exist_ok=True)
    write_json_lines(recipe.dir / "throughput.jsonl", rows)
    write_json_lines(recipe.dir / "break_even.jsonl", crossings)
    draw_throughput(recipe.dir / "throughput.png", rows, crossings)
    return rows, crossings


def _check(name: str, config: TeacherConfig, recipe: ThroughputRecipe) -> None:
    """Builds a teacher and its upsamplers without storage, before the first is timed."""
    if not TEACHERS.is_built_in(config.kind):  # a user's own class may not be built so
        return
    try:
        for _ in _cases(build_teacher(config, device="meta"), recipe):
            pass
    except TeacherError as error:
        raise TeacherError(f"teachers.{name}: {error}") from error


def _measure(name: str, config: TeacherConfig, recipe: ThroughputRecipe) -> list[dict[str, Any]]:
    """The rows of one teacher: measured ones, and the hypothetical linear encoder."""
    try:
        cases = list(_cases(build_teacher(config, device=distributed.device()), recipe))
    except TeacherError as error:
        raise TeacherError(f"teachers.{name}: {error}") from error
    spec = cases[0].teacher.spec
    seconds = [s / recipe.batch_size for s in _time(cases, spec, recipe)]
    facts = {"batch_size": recipe.batch_size, "rounds": recipe.rounds} | _machine(recipe.precision)
    rows = [
        _row(name, spec, case.method, case.factor, each) | {"encoder_passes": case.passes} | facts
        for case, each in zip(cases, seconds, strict=True)
    ]
    linear = [
        _row(name, spec, "linear", (fh, fw), seconds[0] * fh * fw) | {"encoder_passes": None}
        for fh, fw in [_NATIVE, *recipe.factors]
    ]
    return rows + [row | facts for row in linear]


def _cases(teacher: Teacher, recipe: ThroughputRecipe) -> Iterator[Case]:
    """The points to measure, the encoder at its native size first."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision]
    teacher.cast(dtype)
    spec, device = teacher.spec, teacher.mean.device
    yield Case("encoder", _NATIVE, teacher, 1)
    factors = [factor for factor in recipe.factors if factor != _NATIVE]
    for factor in factors:
        if spec.accepts(*scaled(spec.resolution, factor)):
            yield Case("encoder", factor, teacher, None)
    phi_s = any_phi_s(spec.spatial_dim)
    for name, entry in recipe.upsamplers.items():
        for factor in recipe.factors:
            config = parse_upsampler({**entry, "factor": factor})
            assert config is not None
            upsampler = build_upsampler(config, spec)
            if upsampler.spatial_dim == spec.spatial_dim:  # as the upsampler of a teacher is
                upsampler = Standardised(upsampler, phi_s)
            upsampled = UpsampledTeacher(teacher, upsampler.to(device)).cast(dtype)
            yield Case(name, factor, upsampled.freeze(), upsampler.num_forwards)


def _time(cases: list[Case], spec: FeatureSpec, recipe: ThroughputRecipe) -> list[float]:
    """Median seconds of a call of each case; cases take turns, to share slow phases alike."""
    device = distributed.device()
    generator = torch.Generator().manual_seed(0)
    images = {
        case.factor: torch.rand(
            recipe.batch_size, 3, *scaled(spec.resolution, case.factor), generator=generator
        ).to(device)
        for case in cases
    }
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(recipe.rounds + 1):
        for case, times in zip(cases, seconds, strict=True):
            elapsed = _elapsed(partial(case.teacher, images[case.factor]), device)
            if number:
                times.append(elapsed)
    return [median(times) for times in seconds]


def _elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, including its kernels on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000


def _row(
    name: str, spec: FeatureSpec, method: str, factor: tuple[int, int], seconds: float
) -> dict[str, Any]:
    tokens = math.prod(scaled(spec.grid(*spec.resolution), factor))
    return {
        "teacher": name,
        "method": method,
        "factor": list(factor),
        "resolution": list(scaled(spec.resolution, factor)),
        "tokens": tokens,
        "seconds_per_image": seconds,
        "seconds_per_token": seconds / tokens,
    }


def _break_evens(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares each upsampler with the encoder at the full size, if that was measured."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        fh, fw = row["factor"]
        if fh * fw > 1 or row["method"] == "encoder":
            curves.setdefault(row["method"], {})[fh * fw] = row["seconds_per_image"]
    encoder = curves.pop("encoder")
    del curves["linear"]
    if len(encoder) < 2:
        return []
    crossings = {method: break_even(encoder, curve) for method, curve in curves.items()}
    return [{"teacher": name, "method": m} | each._asdict() for m, each in crossings.items()]


def _machine(precision: str) -> dict[str, Any]:
    device = distributed.device()
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,
    }
