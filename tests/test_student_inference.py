"""How students are deployed: captured whole by torch.export, at any size and memory format."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from student.model import Student
from tests.tiny_export import build, outputs

SIZES = [(2, 12, 20), (1, 24, 24), (3, 32, 8)]  # the table has 24 x 24 px


@pytest.fixture(scope="module")
def student() -> Student:
    model = build()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def assert_same(student: Student, run: Callable[[Tensor], dict[str, Tensor]]) -> None:
    for batch, height, width in SIZES:
        images = torch.rand(batch, 3, height, width)
        came, due = run(images), outputs(student, images)
        assert came.keys() == due.keys()
        for name, value in due.items():
            torch.testing.assert_close(came[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_torch_export_makes_one_program_for_every_size(student: Student) -> None:
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    sizes = {"images": {0: batch, 2: 4 * rows, 3: 4 * columns}}
    program = torch.export.export(student, (torch.rand(2, 3, 12, 16),), dynamic_shapes=sizes)
    exported = program.module()

    def run(images: Tensor) -> dict[str, Tensor]:
        backbone, heads = exported(images)
        named = {"backbone": backbone, **heads}
        parts = [(f"{n}/{p}", v) for n, f in named.items() for p, v in f._asdict().items()]
        return {name: value for name, value in parts if value is not None}

    assert_same(student, run)


def test_images_may_lie_with_their_channels_last(student: Student) -> None:
    def run(images: Tensor) -> dict[str, Tensor]:
        return outputs(student, images.contiguous(memory_format=torch.channels_last))

    assert_same(student, run)
