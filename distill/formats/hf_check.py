"""Checks an export for transformers against its student: by our own reader, and by transformers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.runtime.errors import RecipeError
from student.model import Student
from student.storage import StudentFile, load_student, student_of

LIMIT = 1e-5  # in float32, of the largest value, and of 1 where all are smaller
_OURS = "student.load returns the same bits"
_GRIDS = ((3, 3), (2, 5))  # in patches


@torch.no_grad()
def check_hf(folder: Path, file: StudentFile) -> str:
    """Checks that readers of a folder return what the student does.

    Our own reader returns the same bits, heads included. transformers stays within `LIMIT` at a
    square and an oblong size, by its eager and its fused attention.

    Returns:
        A sentence that says what was checked, and how far transformers is from the student.

    Raises:
        RecipeError: a reader returns something else.
    """
    student = student_of(file.config, file.targets, file.state_dict, "the student")
    _check_ours(folder, student, _images(student)[1])
    try:
        import transformers
    except ImportError:
        return f"{_OURS}; transformers is not installed, so it was not asked"
    version = transformers.__version__
    try:
        from transformers import AutoModel, RadioModel  # noqa: F401
    except ImportError:
        return f"{_OURS}; transformers {version} has no RADIO, 5.24 does"
    except RuntimeError as error:  # as of a torchvision that does not fit torch
        return f"{_OURS}; transformers {version} cannot be imported: {error}"
    student = student.float()
    with _quiet(transformers):
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    largest = 0.0
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for images in _images(student):
            largest = max(largest, _difference(student, model, images))
    if not largest <= LIMIT:  # NaN too
        raise RecipeError(
            f"--format hf: transformers {version} returns other features than the "
            f"student: they differ by {largest:.0e}, and the limit is {LIMIT:.0e}; use another "
            "format"
        )
    return f"{_OURS}; transformers {version} differs by at most {largest:.0e}"


def _check_ours(folder: Path, student: Student, images: Tensor) -> None:
    again = load_student(folder)
    expected, returned = (_named(model, images) for model in (student, again))
    for name, value in expected.items():
        if name not in returned or not torch.equal(value, returned[name]):
            raise RecipeError(f"--format hf: the folder cannot hold this student's {name}")


def _named(student: Student, images: Tensor) -> dict[str, Tensor]:
    backbone, heads = student(images)
    return {
        f"{name} {part}": value
        for name, features in {"backbone": backbone, **heads}.items()
        for part, value in features._asdict().items()
        if value is not None
    }


def _images(student: Student) -> list[Tensor]:
    p = student.config.patch_size
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, h * p, w * p, generator=generator) for h, w in _GRIDS]


def _difference(student: Student, model: Any, images: Tensor) -> float:
    expected = student(images).backbone
    came = model(pixel_values=images)
    pairs = [(came.features, expected.spatial.flatten(2).transpose(1, 2))]
    if expected.summary is not None:
        pairs.append((came.summary, expected.summary))
    return max(
        float((one - other).abs().max() / other.abs().max().clamp(min=1)) for one, other in pairs
    )


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar of loading."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
