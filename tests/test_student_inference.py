"""How students are deployed: at any size and memory format."""

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


def test_images_may_lie_with_their_channels_last(student: Student) -> None:
    def run(images: Tensor) -> dict[str, Tensor]:
        return outputs(student, images.contiguous(memory_format=torch.channels_last))

    assert_same(student, run)
