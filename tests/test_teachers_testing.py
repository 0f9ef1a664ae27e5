"""The public contract: what `check_teacher` says of teachers that break one promise each."""

import pytest
import torch
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.testing import check_teacher
from tests.doubles import Patches

SPEC = FeatureSpec(
    summary_dim=3, spatial_dim=4, patch_size=8, resolution=(16, 16), any_resolution=True
)


class Good(Patches):
    """Passes the check; the classes below each break one promise."""

    def __init__(self) -> None:
        super().__init__(SPEC)


class Numbering(Good):
    """Adds to each image its place in the batch."""

    def extract(self, images: Tensor) -> Features:
        summary, maps = super().extract(images)
        return Features(summary, maps + torch.arange(len(maps)).view(-1, 1, 1, 1))


class Narrow(Good):
    """A difference of large numbers, which bfloat16 rounds away."""

    def extract(self, images: Tensor) -> Features:
        summary, maps = super().extract(images)
        return Features(summary, (maps + 1000) - 1000)


class Stubborn(Good):
    """Runs a part in float32, whose weights `cast` then has no business to change."""

    def extract(self, images: Tensor) -> Features:
        with torch.autocast("cpu", enabled=False):
            return super().extract(images.float())


class Traced(Good):
    def extract(self, images: Tensor) -> Features:
        summary, maps = super().extract(images)
        return Features(summary, maps + int(torch.compiler.is_compiling()))


class Counting(Good):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def extract(self, images: Tensor) -> Features:
        self.calls += 1
        return super().extract(images)


class Undefined(Good):
    def extract(self, images: Tensor) -> Features:
        summary, spatial = super().extract(images)
        return Features(summary, spatial if len(images) > 1 else spatial * torch.nan)


class Layerless(Good):
    num_layers = 2


@pytest.mark.parametrize(
    "kind, message",
    [
        (Numbering, "Numbering: the spatial differs with chunk_size 1"),
        (Undefined, "Undefined"),
        (Narrow, r"Narrow: in bfloat16 the spatial is \d+% off; rounding explains at most 20%"),
        (Stubborn, "Stubborn fails on images of shape .*; in bfloat16, see Teacher.fp32_modules"),
        (Traced, "Traced: the spatial differs under torch.compile"),
        (Counting, "Counting: running it changes its fingerprint"),
        (Layerless, r"Layerless.layers\(\[0, 1\]\) fails: TeacherError: Layerless sets num_layers"),
    ],
)
def test_the_check_says_which_promise_is_broken(kind: type[Good], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        check_teacher(kind())


def test_what_precedes_any_training_is_part_of_the_check() -> None:
    class Liar(Good):
        def extract(self, images: Tensor) -> Features:
            return Features(None, super().extract(images).spatial)

    with pytest.raises(TeacherError, match=r"Liar fails on .*summary of shape None.*\(2, 3\)"):
        check_teacher(Liar())


def test_a_good_teacher_passes_and_is_left_as_it_was() -> None:
    teacher = Good()
    teacher.chunk_size = 3
    attributes = set(vars(teacher))
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    check_teacher(teacher)
    assert teacher.chunk_size == 3
    assert teacher.compute_dtype == torch.float32
    assert set(vars(teacher)) == attributes
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, weights[name])
