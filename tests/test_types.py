"""FeatureSpec's sizes, and the shapes, chunks and layers of a Teacher."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD
from teachers.teacher import Teacher, even_layers

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


def test_words_about_where_features_are_taken_change_no_identity_and_are_stored() -> None:
    told = replace(FREE, spatial_from="last block", summary_from="class token")
    assert told == FREE
    assert repr(told) == repr(FREE)  # a fingerprint counts it
    specs = TypeAdapter(FeatureSpec)
    assert specs.validate_json(specs.dump_json(told)).spatial_from == "last block"
    old = specs.dump_python(FREE, exclude={"spatial_from", "summary_from"})
    assert specs.validate_python(old).spatial_from == ""


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


class Layered(Pool):
    """Three layers: the map, its double on a finer grid, its triple."""

    num_layers = 3

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        self.seen.append(len(images))
        spatial = self.net(images)
        fine = (2 * spatial).repeat_interleave(2, -1)
        return [(spatial.bfloat16(), fine, 3 * spatial)[index] for index in indices]


def test_layers_come_for_any_batch_in_their_order_and_shapes() -> None:
    teacher, images = Layered(chunk_size=2), torch.rand(3, 3, 32, 48, requires_grad=True)
    first, second = teacher.layers(images, [0, 1])
    assert teacher.seen == [2, 1]
    assert (first.shape, second.shape) == ((3, 4, 2, 3), (3, 4, 2, 6))
    assert first.dtype == second.dtype == torch.float32
    assert not second.requires_grad
    torch.testing.assert_close(
        second[..., ::2], 2 * teacher.net((images - teacher.mean) / teacher.std)
    )


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [-1, 2], [3]])
def test_layers_that_are_not_there_are_refused(indices: list[int]) -> None:
    with pytest.raises(TeacherError, match="layers: expected increasing .* from 0 to 2, got"):
        Layered().layers(torch.rand(1, 3, 32, 32), indices)


def test_an_encoder_without_layers_says_so() -> None:
    with pytest.raises(TeacherError, match="Pool returns its last map only.*linear"):
        Pool().layers(torch.rand(1, 3, 32, 32), [0])


def test_an_adapter_with_half_of_what_layers_need_is_named() -> None:
    class Half(Pool):
        num_layers = 3

    with pytest.raises(TeacherError, match="Half sets num_layers but has no extract_layers"):
        Half().layers(torch.rand(1, 3, 32, 32), [0])


def test_layers_of_other_shapes_than_promised_are_named() -> None:
    class Flat(Layered):
        def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
            return [images.flatten(1)]

    with pytest.raises(RuntimeError, match=r"Flat.extract_layers: .* got shapes \[\(1, 3072\)\]"):
        Flat().layers(torch.rand(1, 3, 32, 32), [0])


def test_layers_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(ValueError, match="nearest size"):
        Layered().layers(torch.rand(1, 3, 30, 32), [0])


def test_even_layers_end_with_the_last() -> None:
    assert even_layers(12) == (2, 5, 8, 11)
    assert even_layers(24) == (5, 11, 17, 23)
