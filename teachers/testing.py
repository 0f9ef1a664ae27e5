"""Checks the complete contract of a teacher, for the tests of its author.

    from teachers.testing import check_teacher

    def test_my_teacher():
        check_teacher(MyTeacher(MyConfig(weights="none")))

On the CPU, with random weights and a small network, this takes seconds.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor

from teachers.dry_run import differ, dry_run, encode, probe_images
from teachers.errors import TeacherError
from teachers.features import Features
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher

_T = TypeVar("_T")
# Relative to the norm. Rounding costs deep encoders a few per cent; a norm in bfloat16 costs more.
_HALF_TOLERANCE = 0.2


def check_teacher(teacher: Teacher) -> None:
    """Checks everything that this project relies on, with two images of `probe_images`:

    - the spec: shapes, channels, float32, finite numbers (`dry_run`, which precedes any training);
    - frozen: eval mode, no parameter that requires gradients;
    - the features of an image depend on no other image, no chunk size and no earlier call;
    - precision: the same features in bfloat16, up to rounding;
    - `torch.compile` traces it, with the same features;
    - its layers, if it has any;
    - a fingerprint that running it does not change.

    On the meta device only shapes and types are checked. The teacher stays unchanged.

    Raises:
        TeacherError: the teacher breaks the contract; names the place.
    """
    dry_run(teacher)
    images = probe_images(teacher)
    _check_layers(teacher, images)
    if images.is_meta:
        return
    before = teacher_fingerprint(teacher)
    whole = encode(teacher, images)
    _check_chunks(teacher, images, whole)
    _check_half(teacher, images, whole)
    _check_compiled(teacher, images, whole)
    if teacher_fingerprint(teacher) != before:
        raise TeacherError(
            f"{_name(teacher)}: running it changes its fingerprint, so its caches would never be "
            "found again; which of its attributes or buffers does extract change?"
        )


def _name(teacher: Teacher) -> str:
    return type(teacher).__name__


def _check_layers(teacher: Teacher, images: Tensor) -> None:
    if teacher.num_layers:
        indices = sorted({0, teacher.num_layers - 1})
        _run(f"{_name(teacher)}.layers({indices})", lambda: teacher.layers(images, indices))


def _check_chunks(teacher: Teacher, images: Tensor, whole: Features) -> None:
    chunk_size = teacher.chunk_size
    teacher.chunk_size = 1
    try:
        chunked = encode(teacher, images)
    finally:
        teacher.chunk_size = chunk_size
    _same(teacher, chunked, whole, "with chunk_size 1")


def _check_half(teacher: Teacher, images: Tensor, whole: Features) -> None:
    try:
        half = encode(deepcopy(teacher).cast(torch.bfloat16), images)
    except TeacherError as error:
        raise TeacherError(f"{error}; in bfloat16, see Teacher.fp32_modules") from error
    for name, came, expected in _pairs(half, whole):
        off = float((came - expected).norm() / expected.norm())
        if not off < _HALF_TOLERANCE:  # NaN too
            raise TeacherError(
                f"{_name(teacher)}: in bfloat16 the {name} is {off:.0%} off; rounding explains "
                f"at most {_HALF_TOLERANCE:.0%}"
            )


def _check_compiled(teacher: Teacher, images: Tensor, whole: Features) -> None:
    torch._dynamo.reset()  # earlier traces count towards its limit of recompilations
    compiled = torch.compile(deepcopy(teacher), backend="eager")  # a copy: it adds attributes
    features = _run(f"torch.compile of {_name(teacher)}", lambda: compiled(images))
    _same(teacher, features, whole, "under torch.compile")
    torch._dynamo.reset()


def _run(what: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except Exception as error:  # a user's own code may raise anything
        raise TeacherError(f"{what} fails: {type(error).__name__}: {error}") from error


def _same(teacher: Teacher, came: Features, expected: Features, when: str) -> None:
    for name, a, b in _pairs(came, expected):
        if differ(teacher, a, b):
            raise TeacherError(f"{_name(teacher)}: the {name} differs {when}")


def _pairs(came: Features, expected: Features) -> Sequence[tuple[str, Tensor, Tensor]]:
    return [
        (name, a, b)
        for name, a, b in zip(Features._fields, came, expected, strict=True)
        if a is not None and b is not None
    ]
