"""Mosaics: packing and unpacking, the published counts, and what has no room."""

import pytest
import torch

from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.mosaic import Mosaic
from tests.doubles import MeanColours


def mean_colours(resolution: tuple[int, int] = (32, 48)) -> MeanColours:
    return MeanColours(4, resolution, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def _spec(grid: int, patch: int = 16) -> FeatureSpec:
    side = grid * patch
    return FeatureSpec(summary_dim=None, spatial_dim=8, patch_size=patch, resolution=(side, side))


@pytest.mark.parametrize(
    ("canvas", "grid", "tiles", "pitch"),
    [
        (64, 16, 4, 16),  # SAM-H and students of 256 px: 16 images
        (64, 27, 2, 32),  # 432 px: 4 images, 5 cells between them
        (72, 24, 3, 24),  # SAM 3 and 384 px
        (72, 12, 6, 12),
        (72, 27, 2, 36),
    ],
)
def test_the_published_mosaics(canvas: int, grid: int, tiles: int, pitch: int) -> None:
    """Cells of SAM (1024 px / 16) and SAM 3 (1152 px / 16) for grids of RADIO students."""
    mosaic = Mosaic.fit(_spec(canvas), (grid, grid))
    assert (mosaic.tiles, mosaic.pitch) == ((tiles, tiles), (pitch, pitch))
    assert mosaic.num_images == tiles * tiles


@pytest.mark.parametrize("grid", [(2, 3), (4, 6), (3, 5), (8, 6)])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_each_image_gets_the_map_that_it_would_have_alone(
    grid: tuple[int, int], count: int
) -> None:
    teacher = mean_colours()
    mosaic = Mosaic.fit(teacher.spec, grid)
    images = torch.rand(count, 3, 4 * grid[0], 4 * grid[1])
    alone = torch.nn.functional.avg_pool2d((images - teacher.mean) / teacher.std, 4)
    features = mosaic.encode(teacher, images)
    assert features.summary is None
    torch.testing.assert_close(features.spatial, alone)
    assert sum(map(len, teacher.seen)) == -(-count // mosaic.num_images)


def test_what_stays_empty_is_zero_behind_the_encoders_own_normalisation() -> None:
    teacher = mean_colours((32, 32))
    Mosaic.fit(teacher.spec, (3, 3)).encode(teacher, torch.ones(1, 3, 12, 12))
    (seen,) = teacher.seen
    assert seen[:, :, :12, :12].abs().min() > 0.1
    seen[:, :, :12, :12] = 0
    assert seen.abs().max() < 1e-6


def test_larger_images_are_shrunk_to_their_tile() -> None:
    teacher = mean_colours((32, 32))
    images = torch.rand(4, 3, 1, 1).expand(-1, -1, 64, 48)
    maps = Mosaic.fit(teacher.spec, (4, 3)).encode(teacher, images).spatial
    colours = (images[:, :, :1, :1] - teacher.mean) / teacher.std
    torch.testing.assert_close(maps, colours.expand_as(maps))


@pytest.mark.parametrize("grid", [(33, 33), (64, 40), (65, 16)])
def test_a_canvas_without_room_for_two_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(TeacherError, match="on the encoder's grid of 64 x 64 give .* at least two"):
        Mosaic.fit(_spec(64), grid)


def test_cells_that_do_not_fill_the_canvas_are_refused() -> None:
    spec = FeatureSpec(
        summary_dim=None, spatial_dim=8, patch_size=14, resolution=(384, 384), native_grid=(27, 27)
    )
    with pytest.raises(TeacherError, match="27 x 27 cells of 14 px do not fill its 384 x 384 px"):
        Mosaic.fit(spec, (9, 9))
