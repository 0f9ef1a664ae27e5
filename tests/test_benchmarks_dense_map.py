"""Maps of images of any size and back to pixels; work that ranks share."""

import pytest
import torch
from torch import Tensor

from distill.benchmarks.dense.dense_map import dense_map, padded_size, to_pixels
from distill.benchmarks.sharing import gather_shares, own_share
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.errors import TeacherError
from teachers.features import Frame
from tests.doubles import SPEC
from tests.ranks import run_on_ranks


def ramp(height: int, width: int) -> Tensor:
    """Red grows downwards, green to the right; blue is one."""
    y = ((torch.arange(height) + 0.5) / height).view(-1, 1).expand(height, width)
    x = ((torch.arange(width) + 0.5) / width).view(1, -1).expand(height, width)
    return torch.stack([y, x, torch.ones(height, width)])[None]


@pytest.mark.parametrize("height, width", [(32, 48), (29, 41)])
def test_a_linear_ramp_survives_encoding_and_enlarging(height: int, width: int) -> None:
    """Half-pixel centres throughout, padding cut off before anything is resized to the image."""
    encoder = Pixels(PixelsConfig(patch_size=4, resolution=(32, 32)))
    images = ramp(height, width)
    maps, covers = dense_map(encoder, images)
    assert covers == Frame(32, 48 if width == 48 else 44)
    again = to_pixels(maps, covers, (height, width)) * 0.25 + 0.5
    inner = (
        ...,
        slice(2, height - 6),
        slice(2, width - 6),
    )  # away from clamped borders and padding
    assert torch.allclose(again[inner], images[inner], atol=1e-5)


def test_padding_repeats_the_last_pixels() -> None:
    encoder = Pixels(PixelsConfig(patch_size=4, resolution=(4, 4)))
    images = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    maps, _ = dense_map(encoder, images)
    assert torch.allclose(maps[0, :, 1], (images[0, :, 4].mean(1, keepdim=True) - 0.5) / 0.25)


def test_an_encoder_of_one_size_says_how_to_use_it() -> None:
    assert padded_size(SPEC, 12, 20) == (12, 20)
    with pytest.raises(TeacherError, match=r"12 x 20 px only; resize them, input.size=\[12,20\]"):
        padded_size(SPEC, 24, 20)


def gathered(count: int) -> list[list[float]]:
    own = torch.tensor([[float(i), 0.5] for i in own_share(count)]).view(-1, 2)
    return gather_shares(own, count).tolist()  # type: ignore[no-any-return]


@pytest.mark.process
def test_shares_come_back_in_order_on_every_rank() -> None:
    for count in (1, 5, 6):
        due = [[float(i), 0.5] for i in range(count)]
        assert run_on_ranks(2, gathered, count) == [due, due]
        assert gathered(count) == due


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_pixels_of_a_stride_are_those_of_all_pixels(stride: int) -> None:
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    covers, size = Frame(20, 28), (18, 27)
    every = to_pixels(maps, covers, size)[..., stride // 2 :: stride, stride // 2 :: stride]
    assert torch.allclose(to_pixels(maps, covers, size, stride), every, atol=1e-12)
