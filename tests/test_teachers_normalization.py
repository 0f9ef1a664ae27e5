"""Images that are not in [0, 1] are said once, by whoever normalises them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.tasks.student_encoder import StudentEncoder
from student.config import StudentConfig
from student.model import Student
from teachers.features import FeatureSpec
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.tile import Tile
from tests.doubles import SPEC, Patches

Said = Callable[[], list[str]]
SIZE = SPEC.resolution


def student() -> Student:
    config = StudentConfig(width=32, depth=1, heads=2, mlp_ratio=2, max_resolution=32)
    target = FeatureSpec(summary_dim=3, spatial_dim=8, patch_size=16, resolution=(32, 32))
    return Student(config, {"clip": target}).eval()


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "Student": (student, (32, 32)),
    "Patches": (Patches, SIZE),
}


@pytest.mark.parametrize("name", MODELS)
def test_images_up_to_255_are_said_once(name: str, said: Said) -> None:
    make, size = MODELS[name]
    model, images = make(), torch.rand(2, 3, *size)
    model(images)
    model(images * 1.2 - 0.1)  # as resizing overshoots
    assert said() == []
    model(images * 255)
    model(images * 254)
    make()(images * 253)
    (line,) = said()
    assert line.startswith(f"{name}: images from ")
    assert line.endswith("expected [0, 1]; divide 0..255 by 255")


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_images_that_are_normalised_already_are_said(name: str, said: Said) -> None:
    make, size = MODELS[name]
    make()(torch.full((1, 3, *size), 200, dtype=torch.uint8))
    (line,) = said()
    assert line == f"{name}: images from 200 to 200, expected [0, 1]; divide 0..255 by 255"
    with torch.no_grad():
        model = make()
    from teachers import messages

    messages._said.clear()
    model((torch.rand(1, 3, *size) - 0.45) / 0.225)
    (line,) = said()
    assert line.endswith("are they normalised already? It does so itself")


def test_a_wrapped_model_says_it_and_not_its_wrapper(said: Said) -> None:
    teacher = Patches()
    upsampled = UpsampledTeacher(teacher, Tile(teacher.spec, (2, 2)))
    upsampled(torch.rand(1, 3, *upsampled.spec.resolution) * 255)
    StudentEncoder(student())(torch.rand(1, 3, 32, 32) * 255)
    assert [line.split(":")[0] for line in said()] == ["Patches", "Student"]


@pytest.mark.long
def test_nothing_is_read_where_there_is_nothing_to_read(said: Said) -> None:
    model = student()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.rand(1, 3, 32, 32))
    meta = Patches().to("meta")
    meta(torch.empty(1, 3, *SIZE, device="meta"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.rand(1, 3, 32, 32) * 255)
    model(torch.rand(0, 3, 32, 32))
    assert said() == []
