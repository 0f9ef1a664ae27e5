"""Upsamplers and UpsampledTeacher: tiles against whole images, counts, places and sizes."""

import pytest
import torch
import torch.nn.functional as F

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.testing import check_teacher
from teachers.upsampled import UpsampledTeacher, upsampled_spec
from teachers.upsamplers.bilinear import Bilinear
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.resize import resize
from teachers.upsamplers.tile import Tile, join_tiles, split_tiles
from tests.doubles import Patches

SPEC = FeatureSpec(summary_dim=3, spatial_dim=5, patch_size=4, resolution=(8, 12))


FACTORS = [(1, 1), (2, 2), (2, 3), (3, 1)]


@pytest.mark.parametrize("factor", FACTORS)
def test_tiles_of_a_shift_invariant_encoder_are_its_map_of_the_full_image(
    factor: tuple[int, int],
) -> None:
    teacher = Patches(SPEC)
    tiled = UpsampledTeacher(teacher, Tile(SPEC, factor))
    images = torch.rand(2, 3, *tiled.spec.resolution)
    full = teacher.net((images - teacher.mean) / teacher.std)
    torch.testing.assert_close(tiled(images).spatial, full)


@pytest.mark.parametrize("factor", FACTORS)
def test_joining_the_tiles_gives_the_image_back(factor: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 6 * factor[0], 4 * factor[1])
    assert torch.equal(join_tiles(split_tiles(images, factor), factor), images)


def test_tiles_come_image_by_image_and_row_by_row() -> None:
    b, row, col = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(3), indexing="ij")
    coded = (100 * b + 10 * row + col)[:, None].float()
    images = coded.repeat_interleave(8, 2).repeat_interleave(12, 3)
    tiles = split_tiles(images, (2, 3))
    assert tiles.shape == (12, 1, 8, 12)
    assert tiles[:, 0].amin((1, 2)).tolist() == tiles[:, 0].amax((1, 2)).tolist()
    assert tiles[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]


@pytest.mark.parametrize("factor, due", [((1, 1), 1), ((2, 2), 5), ((2, 3), 7), ((4, 1), 5)])
def test_an_image_costs_itself_and_its_tiles_in_one_call(factor: tuple[int, int], due: int) -> None:
    teacher = Patches(SPEC)
    upsampler = Tile(SPEC, factor)
    UpsampledTeacher(teacher, upsampler)(torch.rand(3, 3, 8 * factor[0], 12 * factor[1]))
    assert teacher.batches == [3 * due]
    assert upsampler.num_forwards == due


def test_whole_images_and_tiles_share_the_chunks_and_chunks_change_nothing() -> None:
    chunked, images = Patches(SPEC, chunk_size=4), torch.rand(2, 3, 16, 24)
    high = UpsampledTeacher(chunked, Tile(SPEC, (2, 2)))(images)
    assert chunked.batches == [4, 4, 2]
    whole = UpsampledTeacher(Patches(SPEC), Tile(SPEC, (2, 2)))(images)
    torch.testing.assert_close(high.spatial, whole.spatial)
    torch.testing.assert_close(high.summary, whole.summary)


@pytest.mark.parametrize("kind", [Tile, Bilinear])
def test_summary_and_low_map_are_those_of_the_shrunk_whole_image(
    kind: type[Tile] | type[Bilinear],
) -> None:
    teacher = Patches(SPEC)
    upsampled = UpsampledTeacher(teacher, kind(SPEC, (2, 3)))
    images = torch.rand(2, 3, 16, 36)
    due = teacher(F.interpolate(images, (8, 12), mode="bilinear", antialias=True))
    low, high = upsampled.upsample(images)
    torch.testing.assert_close(low.spatial, due.spatial)
    torch.testing.assert_close(high.summary, due.summary)
    torch.testing.assert_close(upsampled(images).summary, due.summary)


def test_bilinear_costs_one_pass_and_keeps_a_linear_ramp_away_from_the_border() -> None:
    upsampler = Bilinear(SPEC, (2, 3))
    ramp = torch.arange(3).float().expand(1, 5, 2, 3)
    high = upsampler(torch.rand(1, 3, 8, 12), lambda images: Features(None, ramp)).high
    assert high.spatial.shape == (1, 5, 4, 9)
    due = torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 2])  # half-pixel centres
    torch.testing.assert_close(high.spatial[0, 0, 0], due)
    assert upsampler.num_forwards == 1


def test_shrinking_averages_noise_instead_of_picking_pixels() -> None:
    noise = torch.randn(1, 1, 192, 192, generator=torch.Generator().manual_seed(0))
    assert resize(noise, (48, 48)).std() < 0.3
    assert resize(noise, (192, 192)) is noise


def test_the_grid_of_an_encoder_with_unused_pixels_is_that_of_its_tiles() -> None:
    siglip = FeatureSpec(summary_dim=None, spatial_dim=5, patch_size=14, resolution=(384, 384))
    spec = upsampled_spec(siglip, (4, 2))
    assert spec.resolution == (1536, 768)
    assert spec.grid(*spec.resolution) == (108, 54)  # 1536 // 14 would be 109
    with pytest.raises(ValueError, match="1536 x 768 px only"):
        spec.grid(384, 384)


def test_an_upsampled_teacher_with_unused_pixels_keeps_its_promise() -> None:
    spec = FeatureSpec(summary_dim=3, spatial_dim=5, patch_size=4, resolution=(11, 15))
    upsampled = UpsampledTeacher(Patches(spec), Tile(spec, (4, 3)))
    check_teacher(upsampled)
    assert upsampled(torch.rand(1, 3, 44, 45)).spatial.shape == (1, 5, 8, 9)


@pytest.mark.parametrize("kind", ["tile", "bilinear"])
def test_a_factor_is_one_number_or_one_for_each_axis(kind: str) -> None:
    for value, due in ((2, (2, 2)), ([2, 3], (2, 3))):
        config = parse_upsampler({"kind": kind, "factor": value})
        assert config is not None
        assert build_upsampler(config, SPEC).factor == due


@pytest.mark.parametrize("factor", [0, 1.5, [2], [2, 0], True])
def test_an_impossible_factor_is_refused(factor: object) -> None:
    with pytest.raises(TeacherError, match="^factor"):
        parse_upsampler({"kind": "tile", "factor": factor})


def test_an_unknown_upsampler_is_named_with_the_closest_one() -> None:
    with pytest.raises(TeacherError, match="'tiles' is unknown.*did you mean 'tile'.*bilinear"):
        parse_upsampler({"kind": "tiles", "factor": 2})
