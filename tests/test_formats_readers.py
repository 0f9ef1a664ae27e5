"""A student's own file and RADIO's: both readers say what is wrong with a file, by its name."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import student
from distill.formats.radio import save_radio
from distill.formats.source import read_source
from distill.runtime.errors import USER_ERRORS
from student.model import Student
from student.storage import StudentFile, save_student, student_of
from tests.tiny_export import build

State = dict[str, Tensor]


def write_student(path: Path, change: Callable[[State], Any], **header: str) -> Path:
    """A student's file with changed weights, and other entries in its header."""
    model = build()
    save_student(path, model.config, model.targets, model.state_dict(), {})
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = file.metadata() | header
    change(state)
    save_file(state, path, facts)
    return path


def write_radio(path: Path, change: Callable[[State], Any], **header: str) -> Path:
    """The same in RADIO's format."""
    model = build()
    save_radio(path, StudentFile(model.config, model.targets, dict(model.state_dict()), {}))
    loaded = torch.load(path, weights_only=False)
    change(loaded["state_dict"])
    if header:
        loaded["args"] = argparse.Namespace(**(vars(loaded["args"]) | {"model": 3}))
    torch.save(loaded, path)
    return path


WRITERS = {"student.safetensors": write_student, "radio.pth.tar": write_radio}


def _last(state: State) -> str:
    return next(name for name in reversed(state) if "blocks.1.mlp.fc2.weight" in name)


CHANGES: dict[str, Callable[[State], Any]] = {
    "a tensor less": lambda s: s.pop(_last(s)),
    "a tensor more": lambda s: s.update(extra=torch.zeros(2)),
    "another shape": lambda s: s.update({_last(s): torch.zeros(3, 3)}),
    "no tensors": lambda s: s.clear(),
}
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a pointer of Git LFS": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a web page": lambda _: b"<html>not found</html>" * 9,
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "cut by a byte": lambda whole: whole[:-1],
    "zeros in front": lambda whole: bytes(64) + whole[64:],
    "a pickle": lambda _: pickle.dumps({"a": 1}),
    "a pickle of code": lambda _: pickle.dumps(Path("x")),
    "an array": lambda _: b"\x93NUMPY" + bytes(99),
}


def load(path: Path) -> Student:
    """As an export does."""
    file = read_source(path).file
    return student_of(file.config, file.targets, file.state_dict, str(path))


def refused(path: Path) -> str:
    """The message of the error; it is a user's, and names the file."""
    with pytest.raises(USER_ERRORS) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_refused_by_both_readers(tmp_path: Path, name: str, change: str) -> None:
    refused(WRITERS[name](tmp_path / name, CHANGES[change]))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_files_that_are_none_are_refused_by_both_readers(
    tmp_path: Path, name: str, content: str
) -> None:
    path = WRITERS[name](tmp_path / name, lambda state: None)
    path.write_bytes(CONTENTS[content](path.read_bytes()))
    message = refused(path)
    if content == "a pointer of Git LFS":
        assert "`git lfs pull`" in message


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_not_there_is_refused_by_both_readers(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
def test_a_header_that_is_no_header_is_refused_by_both_readers(tmp_path: Path, name: str) -> None:
    refused(WRITERS[name](tmp_path / name, lambda state: None, config="{"))


@pytest.mark.parametrize(
    "header",
    [
        {"config": "[]"},
        {"config": json.dumps({"width": 16})},
        {"targets": "3"},
        {"metadata": "{"},
        {"metadata": "[1]"},
    ],
)
def test_a_student_is_loaded_or_refused_by_its_header(
    tmp_path: Path, header: dict[str, str]
) -> None:
    path = write_student(tmp_path / "s.safetensors", lambda state: None, **header)
    with pytest.raises(USER_ERRORS, match="s.safetensors"):
        student.load(path)


def test_both_readers_return_the_same_features(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    features = []
    for name, write in WRITERS.items():
        model = load(write(tmp_path / name, lambda state: None))
        with torch.no_grad():
            out = model(images)
        features.append([out.backbone, *(out.heads[key] for key in sorted(out.heads))])
    for one, other in zip(*features, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
