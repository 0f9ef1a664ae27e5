"""A student as an encoder: of benchmarks, of another student as its teacher, layer by layer."""

import json
import logging
from pathlib import Path

import pytest
import torch

from distill.runtime.errors import RecipeError
from distill.tasks.build import build_teachers
from distill.tasks.stored_student import StoredStudent, StoredStudentConfig
from distill.tasks.student_recipe import load_student_recipe
from student.config import HeadConfig, StudentConfig
from student.model import Student
from student.storage import save_student
from teachers.build import build_teacher, parse_teacher
from teachers.catalog import licence_of
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.testing import check_teacher
from tests.tiny_run import write_recipe


def encoder(folder: Path, head: str | None = None) -> StoredStudent:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "depth": 2, "patch_size": 4, "max_resolution": 24}
    config = StudentConfig(**sizes, head=HeadConfig(hidden_dim=12, num_layers=1))
    target = FeatureSpec(summary_dim=5, spatial_dim=6, patch_size=14, resolution=(28, 42))
    student = Student(config, {"clip": target})
    path = folder / "student.safetensors"
    save_student(path, student.config, student.targets, student.state_dict(), {})
    return StoredStudent.from_config(StoredStudentConfig(path=path, head=head))


def test_a_students_layers_end_with_its_backbones_map(tmp_path: Path) -> None:
    model, images = encoder(tmp_path), torch.rand(1, 3, 8, 20)
    assert model.num_layers == 2
    first, last = model.layers(images, [0, 1])
    assert torch.equal(last, model(images).spatial)
    assert not torch.equal(first, last)


def test_a_head_shows_no_layers(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="StoredStudent returns its last map only"):
        encoder(tmp_path, head="clip").layers(torch.rand(1, 3, 8, 20), [0])


@pytest.mark.long
@pytest.mark.parametrize("head", [None, "clip"])
def test_a_student_teaches_by_its_kind(tmp_path: Path, head: str | None) -> None:
    expected, images = encoder(tmp_path, head), torch.rand(2, 3, 8, 12)
    entry = {"kind": "student", "path": str(tmp_path / "student.safetensors"), "head": head}
    config = parse_teacher(entry)
    assert parse_teacher(config.model_dump()) == config
    teacher = build_teacher(config)
    check_teacher(teacher)
    assert torch.equal(teacher(images).spatial, expected(images).spatial)
    where = "head of clip" if head else "last block, without a final norm"
    assert teacher.spec.spatial_from == where


def test_a_student_that_is_not_there_is_named_with_its_entry(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    entry = {"kind": "student", "path": str(tmp_path / "nowhere.safetensors")}
    recipe = load_student_recipe(tmp_path / "recipe.yaml", [])
    changed = recipe.model_copy(update={"teachers": {"old": parse_teacher(entry)}})
    with pytest.raises(RecipeError, match=r"teachers\.old: .*nowhere.safetensors"):
        build_teachers(changed)


def test_a_students_licence_tells_those_of_its_teachers(tmp_path: Path) -> None:
    entry = {"kind": "student", "path": str(tmp_path / "student.safetensors")}
    student = encoder(tmp_path).student
    assert licence_of(parse_teacher(entry)).endswith("of its teachers: not in its file")
    kept = {"licences": json.dumps({"clip": "MIT", "dino": "Apache-2.0"})}
    parts = (student.config, student.targets, student.state_dict(), kept)
    save_student(entry["path"], *parts)
    assert licence_of(parse_teacher(entry)) == (
        "Apache-2.0; of its teachers: clip, MIT; dino, Apache-2.0"
    )


def test_a_student_is_measured_at_the_size_that_it_trained_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its file; an older one by its recipe, inside or beside it; else by its position table."""
    student = encoder(tmp_path).student
    path = tmp_path / "student.safetensors"

    def size(
        metadata: dict[str, str], resolution: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        save_student(path, student.config, student.targets, student.state_dict(), metadata)
        config = StoredStudentConfig(path=path, resolution=resolution)
        return StoredStudent.from_config(config).spec.resolution

    recipe = "run: {resolution: [8, 12]}"
    with caplog.at_level(logging.INFO, logger="distill"):
        assert size({"resolution": "[12, 20]", "recipe": recipe}) == (12, 20)
        assert f"{path}: its native size is 12 x 20 px, the largest that it trained at" in (
            caplog.text
        )
        assert size({"recipe": recipe}) == (8, 12)
        assert size({}) == (24, 24)
        assert "the largest of its position table" in caplog.text
        (tmp_path / "recipe.yaml").write_text(
            "arms: {low: {resolution: 8}, high: {resolution: 16}}"
        )
        assert size({}) == (16, 16)
        assert size({}, (20, 24)) == (20, 24)
