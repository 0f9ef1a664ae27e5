"""What a benchmark measures: the layers of a student."""

from pathlib import Path

import pytest
import torch

from distill.evaluation.models import StoredStudent, StoredStudentConfig
from student.config import HeadConfig, StudentConfig
from student.model import Student
from student.storage import save_student
from teachers.errors import TeacherError
from teachers.features import FeatureSpec


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
    with pytest.raises(TeacherError, match="StoredStudent shows its last map only"):
        encoder(tmp_path, head="clip").layers(torch.rand(1, 3, 8, 20), [0])
