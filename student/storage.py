"""Saves and loads a student as one safetensors file: weights, architecture and targets.

Reading needs neither deepspeed nor `distill`, and runs no code from the file.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from student import hf_folder
from student.errors import StudentError
from student.hub import download, on_hub
from student.model import Student
from student.shipped import WEIGHTS, is_name, names, shipped
from student.timm_config import AnyStudentConfig, parse_config
from teachers.features import FeatureSpec
from teachers.files import halved, open_format, save_tensors, shape_mismatch
from teachers.messages import did_you_mean

FORMAT = "featsharp-distill student 1"

_Targets = TypeAdapter(dict[str, FeatureSpec])


class StudentHeader(NamedTuple):
    """The header of a student's file.

    Attributes:
        config: the architecture and pixel normalisation; `init` is None, `weights` is none.
        targets: teacher name to the spec of its features, in the order of the class tokens.
        metadata: further entries: recipe, versions, commit, ...
    """

    config: AnyStudentConfig
    targets: dict[str, FeatureSpec]
    metadata: dict[str, str]


class StudentFile(NamedTuple):
    """The contents of a student's file.

    Attributes:
        config: see `StudentHeader`.
        targets: see `StudentHeader`.
        state_dict: the student's, on the CPU; what is stored in float16 is in float32.
        metadata: see `StudentHeader`.
    """

    config: AnyStudentConfig
    targets: dict[str, FeatureSpec]
    state_dict: dict[str, Tensor]
    metadata: dict[str, str]


def save_student(
    path: str | PathLike[str],
    config: AnyStudentConfig,
    targets: Mapping[str, FeatureSpec],
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    half: bool = False,
) -> None:
    """Writes a student, whole or not at all.

    Args:
        path: the file to write, usually `*.safetensors`.
        config: `Student.config`, whose pixel normalisation is resolved.
        targets: `Student.targets`.
        state_dict: `Student.state_dict()`, or the same names from a gathered or averaged copy.
        metadata: further header entries: recipe, versions, commit, ...
        half: whether to store the matrices in float16; vectors (biases, norms, LayerScale), which
            are few and see large features, are stored in float32.

    Raises:
        StudentError: a value is beyond float16's range.
        RuntimeError: the configuration's pixel normalisation is not resolved, or the state dict
            is not one of such a student.
    """
    if config.mean is None:
        raise RuntimeError("save_student: mean and std are not resolved; pass Student.config")
    config = config.without_weights()
    with torch.device("meta"):
        wrong = _why_not(Student(config, targets), state_dict, "save_student")
    if wrong:
        raise RuntimeError(wrong)
    header = student_header(config, targets, metadata)
    if half:
        state_dict = halved(state_dict, lambda _, t: t.ndim < 2, f"student {path}", StudentError)
    save_tensors(Path(path), state_dict, header, FORMAT)


def student_header(
    config: AnyStudentConfig, targets: Mapping[str, FeatureSpec], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The entries of a student's header; arguments as of `save_student`."""
    return {
        "config": config.model_dump_json(exclude_none=True),
        "targets": _Targets.dump_json(dict(targets)).decode(),
        "metadata": json.dumps(dict(metadata)),
    }


def read_student(path: str | PathLike[str]) -> StudentFile:
    """Reads a file of `save_student`, or a folder for transformers, without building the student.

    Raises:
        StudentError: there is no such file, or it is not one of `save_student`.
    """
    path = student_file(path)
    with _opened(path) as (file, header):
        # Cloned to be aligned in memory: for unaligned weights, as tensors of the file can be, CPU
        # kernels round differently.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        heads_only = hf_folder.TRUNK in file.metadata()
    if heads_only:
        state |= hf_folder.read_trunk(path.with_name(hf_folder.MODEL), len(header.targets))
    # Float16 is how weights are stored, not how they compute.
    state = {n: t.float() if t.dtype == torch.float16 else t for n, t in state.items()}
    return StudentFile(header.config, header.targets, state, header.metadata)


def read_header(path: str | PathLike[str]) -> StudentHeader:
    """Reads the header of a file of `save_student`, without its weights.

    Raises:
        StudentError: there is no such file, or it is not one of `save_student`.
    """
    with _opened(path) as (_, header):
        return header


def student_file(path: str | PathLike[str]) -> Path:
    """The file of a student: the path itself, that of a run that is done, or one that ships.

    Args:
        path: a file; or the folder of a checkpoint, of a run whose last step is saved, or of an
            export for transformers; or `hf://OWNER/NAME[@REVISION]`, see `student.hub.download`;
            or a name, see `student.shipped`.

    Raises:
        StudentError: there is no such file, or the folder is another one, or a run that is not
            done; tells what is there, and how to use it.
    """
    if on_hub(path):
        return download(path)
    if (box := shipped(path)) is not None:
        return box / WEIGHTS
    folder = Path(path)
    if folder.is_file():
        return folder
    for name in (WEIGHTS, hf_folder.HEADS):
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise StudentError(f"student {path}: {_nothing_there(folder)}")
    saved = sorted(each.parent for each in folder.glob(f"checkpoints/step-*/{WEIGHTS}"))
    status = folder / "STATUS.json"
    told = json.loads(status.read_text(encoding="utf-8"))["status"] if status.is_file() else ""
    if saved and told == "done":
        return saved[-1] / WEIGHTS
    if saved:
        raise StudentError(
            f"student {path}: the folder of a run that is not done ({told or 'no STATUS.json'}); "
            f"there are {', '.join(each.name for each in saved)}. Export one, "
            f"`python -m distill.export {saved[-1]} student.safetensors`, or load "
            f"{saved[-1] / WEIGHTS}"
        )
    files = sorted(each.name for each in folder.glob("*.safetensors"))
    what = f"there are {', '.join(files)}; name one of them" if files else "it holds no student"
    raise StudentError(
        f"student {path}: is a folder, but neither that of a run with a checkpoint nor a "
        f"checkpoint, nor an export for transformers with {hf_folder.HEADS}; {what}"
    )


def _nothing_there(path: Path) -> str:
    """What a user is told of a path where nothing lies."""
    beside = [each.name for each in path.parent.glob("*")]
    if not is_name(path):
        return f"there is no such file{did_you_mean(path.name, beside)}"
    box = names()
    return (
        f"there is no such file, and no student of this name ships"
        f"{did_you_mean(path.name, [*box, *beside])}; {', '.join(box) or 'none'} ships; otherwise "
        "give a file, the folder of a run, of a checkpoint or of --format hf, or hf://OWNER/NAME"
    )


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[tuple[Any, StudentHeader]]:
    """A student's file and its header."""
    path = student_file(path)
    with open_format(path, "student", FORMAT, StudentError) as (file, header):
        config = parse_config(header["config"])
        if config.mean is None or config.std is None:  # no default in the place of an answer
            raise StudentError(f"student {path}: its config states no mean and std")
        config = _with_older_keys(config, file.keys())
        targets = _Targets.validate_json(header["targets"])
        yield file, StudentHeader(config, targets, _metadata(header["metadata"], path))


def _with_older_keys(config: AnyStudentConfig, names: Collection[str]) -> AnyStudentConfig:
    """The config of a file that is older than some keys, whose values its weights show."""
    if config.kind == "timm":  # younger than these keys
        return config
    head = config.head
    if "attention_bias" not in head.model_fields_set:
        bias = any(name.startswith("heads.") and name.endswith("attn.qkv.bias") for name in names)
        head = head.model_copy(update={"attention_bias": bias})
    changes: dict[str, Any] = {"head": head}
    if "final_norm" not in config.model_fields_set:
        changes["final_norm"] = "trunk.norm.weight" in names
    return config.model_copy(update=changes)


def _metadata(text: str, path: str | PathLike[str]) -> dict[str, str]:
    """The further entries; by Python's reader, as pydantic's takes no text of any bytes."""
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise StudentError(f"student {path}: not a valid student file: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StudentError(f"student {path}: not a valid student file: metadata are no texts")
    return metadata


def load_student(path: str | PathLike[str]) -> Student:
    """Loads a student, in eval mode, on the CPU, in the dtype it was saved in, float16 in float32.

    Args:
        path: see `student_file`.

    Raises:
        StudentError: there is no such file, it is not one of `save_student`, or its weights are not
            those of the student it describes.
    """
    config, targets, state, _ = read_student(path)
    return student_of(config, targets, state, f"student {path}")


def student_of(
    config: AnyStudentConfig,
    targets: Mapping[str, FeatureSpec],
    state_dict: Mapping[str, Tensor],
    where: str,
) -> Student:
    """Builds a student from its weights, in eval mode; it uses the given tensors, not copies.

    Args:
        config: `Student.config`, whose pixel normalisation is resolved.
        targets: `Student.targets`.
        state_dict: see `save_student`.
        where: origin of the weights, for messages.

    Raises:
        StudentError: the weights are not those of such a student.
    """
    config = config.without_weights()
    with torch.device("meta"):
        student = Student(config, targets)
    if wrong := _why_not(student, state_dict, where):
        raise StudentError(wrong)
    stored = student.state_dict().keys()
    if any(name not in stored for name, _ in student.named_buffers()):
        with torch.random.fork_rng(devices=[]):  # some networks of timm compute tables when built
            student = Student(config, targets)
    student.load_state_dict(state_dict, assign=True)
    return student.eval()


def _why_not(student: Student, state: Mapping[str, Tensor], where: str) -> str | None:
    """Why a state dict is not the student's; None if it is."""
    wrong = shape_mismatch(student.state_dict(), state)
    return f"{where}: {wrong}" if wrong else None
