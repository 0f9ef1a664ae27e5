"""A student as one safetensors file: weights, architecture and targets together.

Reading it needs neither deepspeed nor `distill`, and runs no code from the file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from student.config import StudentConfig
from student.errors import StudentError
from student.model import Student
from teachers.features import FeatureSpec

FORMAT = "featsharp-distill student 1"

_Targets = TypeAdapter(dict[str, FeatureSpec])


class StudentHeader(NamedTuple):
    """What a student's file says of its weights.

    Attributes:
        config: the architecture and pixel normalisation; `init` is None.
        targets: teacher name to what it returns, in the order of the class tokens.
        metadata: whatever the writer wanted to keep beside the weights.
    """

    config: StudentConfig
    targets: dict[str, FeatureSpec]
    metadata: dict[str, str]


class StudentFile(NamedTuple):
    """What a student's file holds.

    Attributes:
        config: see `StudentHeader`.
        targets: see `StudentHeader`.
        state_dict: the student's, on the CPU.
        metadata: see `StudentHeader`.
    """

    config: StudentConfig
    targets: dict[str, FeatureSpec]
    state_dict: dict[str, Tensor]
    metadata: dict[str, str]


def save_student(
    path: str | PathLike[str],
    config: StudentConfig,
    targets: Mapping[str, FeatureSpec],
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a student; the file appears whole or not at all.

    Args:
        path: the file to write, usually `*.safetensors`.
        config: `Student.config`, whose pixel normalisation is resolved.
        targets: `Student.targets`.
        state_dict: `Student.state_dict()`, or the same names from a gathered or averaged copy.
        metadata: kept beside the weights: recipe, versions, commit, ...

    Raises:
        RuntimeError: the configuration's pixel normalisation is not resolved, or the state dict
            is not one of such a student.
    """
    if config.mean is None:
        raise RuntimeError("save_student: mean and std are not resolved; pass Student.config")
    config = config.model_copy(update={"init": None})
    with torch.device("meta"):
        _check_state(Student(config, targets), state_dict, "save_student")
    header = {
        "format": FORMAT,
        "config": config.model_dump_json(exclude_none=True),
        "targets": _Targets.dump_json(dict(targets)).decode(),
        "metadata": json.dumps(dict(metadata)),
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: v.detach().contiguous() for k, v in state_dict.items()}, partial, header)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_student(path: str | PathLike[str]) -> StudentFile:
    """Reads a file of `save_student` without building the student.

    Raises:
        StudentError: there is no such file, or it is not one of `save_student`.
    """
    with _opened(path) as (file, header):
        # Clones are aligned in memory, as the writer's weights were: CPU kernels take another
        # path, with other roundings, for weights that lie where the file has them.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return StudentFile(header.config, header.targets, state, header.metadata)


def read_header(path: str | PathLike[str]) -> StudentHeader:
    """Reads what a file of `save_student` says of its weights, and none of these.

    Raises:
        StudentError: there is no such file, or it is not one of `save_student`.
    """
    with _opened(path) as (_, header):
        return header


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[tuple[Any, StudentHeader]]:
    """A student's file, and its header."""
    if not Path(path).is_file():
        raise StudentError(f"student {path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise StudentError(
                    f"student {path}: its format is {header.get('format')!r}; "
                    f"save_student writes {FORMAT!r}"
                )
            yield (
                file,
                StudentHeader(
                    StudentConfig.model_validate_json(header["config"]),
                    _Targets.validate_json(header["targets"]),
                    json.loads(header["metadata"]),
                ),
            )
    except (SafetensorError, ValidationError, KeyError) as error:
        raise StudentError(f"student {path}: not a file of save_student: {error}") from error


def load_student(path: str | PathLike[str]) -> Student:
    """Loads a student, in eval mode, on the CPU, in the dtype it was saved in.

    Raises:
        StudentError: there is no such file, or it is not one of `save_student`.
        RuntimeError: the file's weights are not those of the student it describes.
    """
    config, targets, state, _ = read_student(path)
    return student_of(config, targets, state, f"student {path}")


def student_of(
    config: StudentConfig,
    targets: Mapping[str, FeatureSpec],
    state_dict: Mapping[str, Tensor],
    where: str,
) -> Student:
    """A student of these weights, in eval mode; it keeps the tensors and makes no others.

    Args:
        config: `Student.config`, whose pixel normalisation is resolved.
        targets: `Student.targets`.
        state_dict: as of `save_student`.
        where: they come from, for the message.

    Raises:
        RuntimeError: the weights are not those of such a student.
    """
    with torch.device("meta"):
        student = Student(config.model_copy(update={"init": None}), targets)
    _check_state(student, state_dict, where)
    student.load_state_dict(state_dict, assign=True)
    return student.eval()


def _check_state(student: Student, state: Mapping[str, Tensor], where: str) -> None:
    own = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    came = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in own | came if own.get(name) != came.get(name))
    if wrong:
        name = wrong[0]
        raise RuntimeError(
            f"{where}: {len(wrong)} weights do not fit the student; "
            f"{name} has shape {came.get(name)}, expected {own.get(name)} (None: absent)"
        )
