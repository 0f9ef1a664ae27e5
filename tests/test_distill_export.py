"""The exported file: the checkpoint's student in every number, and one that needs no trainer."""

import json
import sys
from pathlib import Path

import pytest
import torch

from distill.export import main
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import StudentRecipe
from student.errors import StudentError
from student.model import Student
from student.storage import load_student, read_student
from tests.tiny_export import TARGETS, build, export, outputs, statistics, write_run


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    main()


def test_the_export_returns_what_the_checkpoint_does_bit_for_bit(tmp_path: Path) -> None:
    student = build()
    exported = export(write_run(tmp_path, student), tmp_path / "new" / "s.safetensors")
    expected, actual = outputs(student), outputs(exported)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("head", TARGETS)
def test_the_kept_head_and_the_backbone_return_the_same_bits(tmp_path: Path, head: str) -> None:
    student = build()
    exported = export(write_run(tmp_path, student), tmp_path / "s", heads=(head,))
    expected, actual = outputs(student), outputs(exported)
    assert actual.keys() == {n for n in expected if n.startswith(("backbone/", f"{head}/"))}
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    assert not [n for n in exported.state_dict() if n.startswith("heads.") and head not in n]


def test_an_exported_file_can_be_exported_again(tmp_path: Path) -> None:
    export(write_run(tmp_path, build()), tmp_path / "s", heads=("clip",))
    again = export(tmp_path / "s", tmp_path / "t")
    assert list(again.heads) == ["clip"]
    assert read_student(tmp_path / "t").metadata == read_student(tmp_path / "s").metadata
    with pytest.raises(RecipeError, match="no head 'siglip'.*there are clip"):
        export(tmp_path / "s", tmp_path / "u", heads=("siglip",))
    with pytest.raises(RecipeError, match="statistics of 'clip' are in the checkpoints of its run"):
        export(tmp_path / "s", tmp_path / "u", teacher_space=True)


def test_a_backbone_alone_returns_the_same_bits(tmp_path: Path) -> None:
    student = build()
    exported = export(write_run(tmp_path, student), tmp_path / "s", heads=(), teacher_space=True)
    expected, actual = outputs(student), outputs(exported)
    assert actual.keys() == {"backbone/summary", "backbone/spatial"}
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("head", ["siglip", "clip"])  # clip's head is twice as dense as the grid
def test_a_folded_head_speaks_the_teachers_own_space(tmp_path: Path, head: str) -> None:
    student = build()
    checkpoint = write_run(tmp_path, student)
    folded = export(checkpoint, tmp_path / "s", heads=(head,), teacher_space=True)
    before, actual = outputs(student), outputs(folded)
    expected = statistics(head).inverse(before[f"{head}/spatial"])
    assert (expected - before[f"{head}/spatial"]).abs().max() > 1  # else folding did nothing
    torch.testing.assert_close(actual[f"{head}/spatial"], expected, atol=1e-5, rtol=1e-5)
    for name in (f"{head}/summary", "backbone/summary", "backbone/spatial"):
        assert torch.equal(actual[name], before[name])


def test_the_file_tells_where_it_comes_from(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build())
    export(checkpoint, tmp_path / "s", heads=("clip",), teacher_space=True)
    metadata = read_student(tmp_path / "s").metadata
    assert metadata["recipe"] == (checkpoint / "recipe.yaml").read_text()
    assert json.loads(metadata["versions"]) == {"torch": "2.13"}
    assert (metadata["step"], metadata["head_space"]) == ("7", "teacher")


def test_heads_that_were_never_standardised_are_in_their_teachers_spaces(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build(), phi_s="none")
    plain = export(checkpoint, tmp_path / "s")
    assert read_student(tmp_path / "s").metadata["head_space"] == "teacher"
    again = export(tmp_path / "s", tmp_path / "again", teacher_space=True)
    for name, value in outputs(plain).items():
        assert torch.equal(outputs(again)[name], value)


def test_the_command_writes_and_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, build())
    command(monkeypatch, tmp_path, "--format", "safetensors", tmp_path / "s", "--head", "clip")
    assert "MB, from" in capsys.readouterr().out
    assert list(load_student(tmp_path / "s").heads) == ["clip"]


def test_a_mistake_ends_the_command_with_code_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, build())
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, tmp_path, tmp_path / "s", "--head", "siglib")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: --head: no head 'siglib' (did you mean 'siglip'?); there are siglip, clip, muted\n"
    )
    assert not (tmp_path / "s").exists()


def test_a_file_that_is_there_is_overwritten_only_by_force(tmp_path: Path) -> None:
    checkpoint, out = write_run(tmp_path, build()), tmp_path / "s"
    out.write_text("mine")
    with pytest.raises(RecipeError, match="already exists; --force overwrites it"):
        export(checkpoint, out)
    assert out.read_text() == "mine"
    export(checkpoint, out, force=True)


def test_a_folder_as_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a folder; name the file to write, .*/NAME\.safe"):
        export(write_run(tmp_path, build()), tmp_path, force=True)


@pytest.mark.parametrize(
    ("name", "format", "meant"),
    [
        ("s.onnx", "safetensors", "onnx"),
        ("s.pth.tar", "safetensors", "radio"),
        ("s.safetensors", "onnx", "safetensors"),
    ],
)
def test_a_name_of_another_format_is_refused(
    tmp_path: Path, name: str, format: str, meant: str
) -> None:
    checkpoint = write_run(tmp_path, build())
    with pytest.raises(RecipeError, match=f"{name}: .* did you mean --format {meant}"):
        export(checkpoint, tmp_path / name, format=format)
    assert not (tmp_path / name).exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    student = build(final_norm=True)
    with torch.no_grad():
        student.trunk.norm.weight[:3] = float("nan")
        student.trunk.norm.bias[0] = float("inf")
    checkpoint = write_run(tmp_path, student)
    message = r"[13] of 16 values of trunk.norm.\w+ are NaN or infinite, .* 1 more tensors"
    with pytest.raises(RecipeError, match=message):
        export(checkpoint, tmp_path / "s")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="file/s: cannot be written"):
        export(write_run(tmp_path, build()), tmp_path / "file" / "s")


def test_a_head_that_was_never_trained_has_no_teacher_space(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no statistics of 'muted', whose losses have weight"):
        export(write_run(tmp_path, build()), tmp_path / "s", teacher_space=True)


def test_there_is_nothing_to_fold_where_nothing_was_standardised(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build(), phi_s="none")
    with pytest.raises(RecipeError, match="standardisation=none, so its heads are already"):
        export(checkpoint, tmp_path / "s", heads=("clip",), teacher_space=True)


def test_a_student_of_one_unknown_head_is_refused() -> None:
    config = build().config
    only = config.head.model_copy(update={"only": ("clib",)})
    with pytest.raises(StudentError, match=r"student.head.only: no teacher 'clib' \(did you mean"):
        Student(config.model_copy(update={"head": only}), TARGETS)


def test_a_recipe_that_trains_one_head_only_is_refused() -> None:
    tree = {
        "run": {"dir": "runs/x", "steps": 30, "resolution": 32, "batch_size": 2},
        "data": {"sources": [{"shards": "x.tar"}]},
        "teachers": {"t": {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"}},
        "student": {"size": "tiny", "head": {"only": ["t"]}},
        "schedule": {"warmup_steps": 0},
    }
    with pytest.raises(RecipeError, match="student.head.only: is for exported students"):
        validate(StudentRecipe, tree, "recipe")
