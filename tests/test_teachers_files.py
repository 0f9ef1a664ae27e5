"""Safetensors that we write: other loaders take them, and older files of ours still load."""

import ast
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file

from student.model import Student
from student.storage import FORMAT, load_student, read_student, save_student
from teachers.errors import TeacherError
from teachers.files import format_of, open_format, save_tensors
from tests.tiny_export import build, outputs

ROOT = Path(__file__).parent.parent


def saved(path: Path) -> Student:
    model = build()
    save_student(path, model.config, model.targets, model.state_dict(), {"step": "7"})
    return model


def same(one: Student, other: Student) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_accelerate_loads_a_student(tmp_path: Path) -> None:
    """Without `format: pt` it refuses the file."""
    from accelerate import load_checkpoint_in_model

    model, other = saved(tmp_path / "s.safetensors"), build()
    for parameter in other.parameters():
        parameter.data.zero_()
    load_checkpoint_in_model(other, str(tmp_path / "s.safetensors"))
    assert same(other, model)
    assert torch.equal(outputs(other)["clip/spatial"], outputs(model)["clip/spatial"])


def test_safetensors_own_loader_loads_a_student(tmp_path: Path) -> None:
    model, other = saved(tmp_path / "s.safetensors"), build(layer_scale=None)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert load_model(other, tmp_path / "s.safetensors") == (set(), [])
    assert same(other, model)


def test_transformers_takes_the_weights(tmp_path: Path) -> None:
    from transformers.modeling_utils import load_state_dict

    model = saved(tmp_path / "s.safetensors")
    state = load_state_dict(str(tmp_path / "s.safetensors"))
    assert torch.equal(state["trunk.blocks.0.norm1.weight"], model.trunk.blocks[0].norm1.weight)


def test_a_file_from_before_the_entry_pt_loads(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    model = saved(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    old = {key: value for key, value in header.items() if key != "holds"} | {"format": FORMAT}
    save_file(dict(model.state_dict()), path, old)
    assert same(load_student(path), model)
    assert read_student(path).metadata == {"step": "7"}
    assert format_of(old) == format_of(header) == FORMAT


def test_a_file_of_something_else_is_refused_whoever_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for format, told in ((None, "'pt'"), ("featsharp-distill student 1", "'featsharp-distill st")):
        save_tensors(path, {"x": torch.ones(1)}, {}, format)
        with (
            pytest.raises(TeacherError, match=f"its format is {told}.*expected 'other 1'"),
            open_format(path, "thing", "other 1", TeacherError),
        ):
            pass


def test_nothing_else_writes_safetensors() -> None:
    """So that every file has `format: pt` and is whole or absent."""
    for path in sorted(ROOT.glob("*/**/*.py")):
        place = path.relative_to(ROOT)
        if place.parts[0] not in ("data", "teachers", "student", "distill"):
            continue
        if place == Path("teachers/files.py"):
            continue
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safetensors")
            for alias in node.names
        }
        assert not names & {"save_file", "save_model", "save"}, place
