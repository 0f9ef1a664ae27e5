"""MultiScaleTeacher: which upsampler runs for which grid, and what comes out."""

import pytest
import torch
import torch.nn.functional as F

from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.multi_scale import MultiScaleTeacher
from teachers.testing import check_teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.s2 import S2
from teachers.upsamplers.tile import Tile
from tests.doubles import Patches

SPEC = FeatureSpec(summary_dim=3, spatial_dim=5, patch_size=4, resolution=(8, 12))


def tiles(*factors: tuple[int, int]) -> MultiScaleTeacher:
    return MultiScaleTeacher(Patches(SPEC), [Tile(SPEC, factor) for factor in factors])


@pytest.mark.parametrize(
    ("grid", "factor"),
    [((2, 3), (1, 1)), ((1, 2), (1, 1)), ((3, 3), (2, 1)), ((4, 5), (2, 2)), ((5, 7), (3, 3))],
)
def test_the_cheapest_upsampler_that_covers_the_grid_runs(
    grid: tuple[int, int], factor: tuple[int, int]
) -> None:
    teacher = tiles((3, 3), (1, 1), (2, 2), (2, 1))
    assert teacher.covering(grid).factor == factor
    images = torch.rand(2, 3, 4 * grid[0], 4 * grid[1])
    assert teacher(images).spatial.shape == (2, 5, *grid)
    encoder = teacher.teacher
    assert isinstance(encoder, Patches)
    passes = 1 if factor == (1, 1) else 1 + factor[0] * factor[1]
    assert encoder.batches == [2 * passes]


def test_where_a_factor_hits_the_grid_the_map_is_that_of_the_upsampled_teacher() -> None:
    matched, images = tiles((2, 2), (3, 3)), torch.rand(2, 3, 16, 24)
    expected = UpsampledTeacher(matched.teacher, Tile(SPEC, (2, 2)))(images)
    came = matched(images)
    assert torch.equal(came.spatial, expected.spatial)
    assert came.summary is not None
    assert expected.summary is not None
    assert torch.equal(came.summary, expected.summary)


def test_a_finer_map_is_averaged_down_not_sampled() -> None:
    """From 4 x 6 cells to 3 x 5: the antialiased resize of the tiles, not nearest or plain."""
    matched, images = tiles((2, 2)), torch.rand(1, 3, 12, 20)
    tiled = UpsampledTeacher(matched.teacher, Tile(SPEC, (2, 2))).upsample(images).high.spatial
    expected = F.interpolate(tiled, (3, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(matched(images).spatial, expected)
    plain = F.interpolate(tiled, (3, 5), mode="bilinear")
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_a_grid_out_of_reach_is_refused_with_the_factor_that_would_do() -> None:
    with pytest.raises(TeacherError, match=r"5 x 9 cells.*is 2 x 3.*\[\[2, 2\]\].*one of \[3, 3\]"):
        tiles((2, 2))(torch.rand(1, 3, 20, 36))


def test_it_passes_the_check_of_teachers() -> None:
    check_teacher(tiles((1, 1), (2, 2)))


def test_lists_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"different factors, got \[\[2, 2\], \[2, 2\]\]"):
        tiles((2, 2), (2, 2))
    with pytest.raises(TeacherError, match="keep the encoder's channels"):
        MultiScaleTeacher(Patches(SPEC), [S2(SPEC, (2, 2), beta=None)])
    with pytest.raises(TeacherError, match="expected a list of upsamplers"):
        parse_teacher({"kind": "timm", "model": "test_vit", "upsampler": []})


def test_a_recipe_lists_upsamplers() -> None:
    tiled = [{"kind": "tile", "factor": factor} for factor in (1, 2)]
    entry = {"kind": "timm", "model": "test_vit", "weights": "none", "upsampler": tiled}
    config = parse_teacher(entry)
    teacher = build_teacher(config)
    patch = teacher.spec.patch_size
    h, w = (2 * side // patch - 1 for side in teacher.spec.resolution)
    assert teacher(torch.rand(1, 3, h * patch, w * patch)).spatial.shape[-2:] == (h, w)
    assert parse_teacher(config.model_dump(mode="json")) == config
