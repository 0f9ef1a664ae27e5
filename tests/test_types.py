"""The vocabulary: FeatureSpec's sizes and the teacher's promises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from teachers.features import Features, FeatureSpec
from teachers.teacher import IMAGENET_MEAN, IMAGENET_STD, Teacher

FIXED = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=14, resolution=(384, 384))
FREE = FeatureSpec(
    summary_dim=4, spatial_dim=4, patch_size=16, resolution=(128, 128), any_resolution=True
)


def test_grid_of_a_native_size_drops_the_pixels_that_fill_no_patch() -> None:
    assert FIXED.grid(384, 384) == (27, 27)


def test_grid_keeps_height_and_width_apart() -> None:
    assert FREE.grid(64, 160) == (4, 10)


def test_an_explicit_native_grid_holds_at_the_native_size_only() -> None:
    tiled = replace(FIXED, resolution=(1152, 768), native_grid=(81, 54), any_resolution=True)
    assert tiled.grid(1152, 768) == (81, 54)
    assert tiled.grid(140, 280) == (10, 20)


def test_a_fixed_encoder_refuses_another_size_and_names_its_own() -> None:
    with pytest.raises(ValueError, match="512 x 512 px.*384 x 384 px only.*nearest"):
        FIXED.grid(512, 512)


def test_a_free_encoder_refuses_a_partial_patch_and_names_the_nearest_size() -> None:
    with pytest.raises(ValueError, match="multiples of 16 px.*nearest size is 96 x 160 px"):
        FREE.grid(100, 160)


class Pool(Teacher):
    """Mean colours of 16 px patches, through one trainable layer and a dropout."""

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__(FREE, mean=IMAGENET_MEAN, std=IMAGENET_STD, chunk_size=chunk_size)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Dropout(0.5))
        self.seen: list[int] = []

    def extract(self, images: Tensor) -> Features:
        self.seen.append(len(images))
        spatial = self.net(images)
        return Features(spatial.mean((2, 3)), spatial.bfloat16())


def test_a_teacher_stays_frozen_and_in_eval_when_its_parent_trains() -> None:
    teacher = Pool()
    nn.ModuleList([teacher]).train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_returns_float32_without_a_graph() -> None:
    images = torch.rand(2, 3, 32, 48, requires_grad=True)
    summary, spatial = Pool()(images)
    assert summary.dtype == spatial.dtype == torch.float32
    assert not spatial.requires_grad
    assert spatial.shape == (2, 4, 2, 3)


def test_chunks_bound_the_batch_and_change_nothing() -> None:
    torch.manual_seed(0)
    whole, images = Pool(), torch.rand(5, 3, 32, 32)
    chunked = Pool(chunk_size=2)
    chunked.load_state_dict(whole.state_dict())
    torch.testing.assert_close(chunked(images).spatial, whole(images).spatial)
    assert chunked.seen == [2, 2, 1]


def test_a_teacher_whose_spec_lies_is_named() -> None:
    class Liar(Pool):
        def extract(self, images: Tensor) -> Features:
            return Features(None, super().extract(images).spatial)

    with pytest.raises(RuntimeError, match=r"Liar.extract .* summary of shape None.*\(1, 4"):
        Liar()(torch.rand(1, 3, 32, 32))
