"""Views: the sampled homographies, and warps of maps and images against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from teachers.upsamplers.guidance import area_resize
from teachers.upsamplers.views import (
    ViewsConfig,
    sample_homographies,
    valid_mask,
    warp,
    warp_images,
)

IDENTITY = torch.eye(3, dtype=torch.float64)[None]
STILL = ViewsConfig(zoom=1, perspective=(0, 0), rotation_degrees=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(config: ViewsConfig, batch: int = 2, grid: tuple[int, int] = (24, 36)) -> Tensor:
    return sample_homographies(config, batch, grid, seeded())


def shifted(dx: float, dy: float) -> Tensor:
    """A view that looks at the base (dx, dy) normalised units further right and down."""
    homography = IDENTITY.clone()
    homography[0, :2, 2] = torch.tensor([dx, dy], dtype=torch.float64)
    return homography


def centres(n: int) -> Tensor:
    return (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1


def ramp(height: int, width: int) -> Tensor:
    """(1, 2, H, W): each cell's own normalised x and y, which bilinear sampling reproduces."""
    y, x = torch.meshgrid(centres(height), centres(width), indexing="ij")
    return torch.stack([x, y])[None]


def mapped(homography: Tensor, x: float, y: float) -> list[float]:
    """Where a homography takes one point: three dot products and a division."""
    a, b, c = (sum(r * v for r, v in zip(row, (x, y, 1.0), strict=True)) for row in homography)
    return [float(a / c), float(b / c)]


def test_views_that_may_not_move_are_the_identity() -> None:
    torch.testing.assert_close(sample(STILL), IDENTITY.expand(2, 5, 3, 3), atol=1e-12, rtol=0)


def test_one_generator_gives_one_set_of_views() -> None:
    config = ViewsConfig()
    assert sample(config).shape == (2, 5, 3, 3)
    assert torch.equal(sample(config), sample(config))
    assert not torch.equal(sample(config)[0], sample(config)[1])
    assert not torch.equal(sample_homographies(config, 2, (24, 36), seeded(1)), sample(config))


def test_a_rotated_view_of_a_rectangle_keeps_right_angles_and_lengths_in_cells() -> None:
    config = STILL.model_copy(update={"rotation_degrees": 30.0})
    side = torch.tensor([36.0, 24.0], dtype=torch.float64) / 2
    for homography in sample(config).flatten(0, 1):
        linear = side[:, None] * homography[:2, :2] / side
        torch.testing.assert_close(linear @ linear.T, torch.eye(2, dtype=torch.float64))
        angle = math.degrees(math.atan2(float(linear[0, 1]), float(linear[0, 0])))
        assert 0 < abs(angle) <= 30


def test_zoom_stays_within_its_range_on_both_sides_of_one() -> None:
    config = STILL.model_copy(update={"zoom": 1.25, "num_views": 200})
    zooms = 1 / sample(config)[..., 0, 0].flatten()
    assert 0.8 <= zooms.min() < 0.83
    assert 1.2 < zooms.max() <= 1.25
    assert abs(zooms.log().mean()) < 0.03  # log-uniform: as often larger as smaller


def test_perspective_moves_the_corners_as_far_as_its_range_says() -> None:
    # The still frame's corners, found from the view: their spread is the drawn one.
    config = STILL.model_copy(update={"perspective": (0.03, 0.03), "num_views": 400})
    back = torch.linalg.inv(sample(config, grid=(30, 30)).flatten(0, 1))
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]).double()
    moved = corners @ back.mT
    moved = moved[..., :2] / moved[..., 2:]
    spread = (moved[:, 1] - moved[:, 0])[:, 0] / 2  # upper side, in sides; shifts cancel
    assert abs(float(spread.std()) - 0.03 * math.sqrt(2)) < 0.005


def test_shifts_are_whole_steps_within_the_frame_that_the_rotation_made() -> None:
    config = STILL.model_copy(
        update={"rotation_degrees": 20.0, "shift_cells": 2.0, "num_views": 100}
    )
    side = torch.tensor([36.0, 24.0], dtype=torch.float64)
    taken = set()
    for homography in sample(config).flatten(0, 1):
        linear = (side[:, None] * homography[:2, :2] / side).T  # base to view: a rotation
        shift = linear @ (homography[:2, 2] * side / 2)
        frame = linear.abs() @ side
        room = frame - side
        steps = (shift + room / 2) / 2
        torch.testing.assert_close(steps, steps.round(), atol=1e-9, rtol=0)
        assert (steps > -1e-9).all()
        assert (steps * 2 <= room + 1e-9).all()
        taken.add(tuple(steps.round().int().tolist()))
    assert len(taken) > 8


def test_zoomed_out_views_look_beyond_the_base_and_say_so() -> None:
    out = torch.diag(torch.tensor([1.25, 1.0, 1.0])).double()[None]
    mask = valid_mask(out, (3, 10))
    assert torch.equal(mask[0, 0, 0], torch.tensor([0.0] + [1.0] * 8 + [0.0]).double())
    assert mask.shape == (1, 1, 3, 10)


def test_cells_behind_the_horizon_are_not_valid() -> None:
    homography = shifted(0.625, 0)
    homography[0, 2, 0] = 4  # depth 1 + 4 x, negative on the left; (0, 0, -1.5) at cell (1, 1)
    assert valid_mask(homography, (3, 8))[0, 0, 1].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert warp(ramp(4, 4), homography, (4, 4)).isfinite().all()


def null_space_homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The direct linear transform: the vector that eight equations without a right side leave."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y, -u])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y, -v])
    return np.linalg.svd(np.array(rows))[2][-1].reshape(3, 3)


def test_a_view_is_zoom_then_corners_then_rotation_then_shift() -> None:
    config = ViewsConfig(num_views=1, perspective=(0.08, 0.1), rotation_degrees=40, zoom=1.5)
    generator, (height, width) = seeded(3), (24, 36)
    homography = sample_homographies(config, 1, (height, width), seeded(3))[0, 0].numpy()
    u = torch.rand(1, 1, 5, dtype=torch.float64, generator=generator)[0, 0].numpy()
    moves = torch.randn(1, 1, 4, 2, dtype=torch.float64, generator=generator)[0, 0].numpy()
    side = np.array([width, height])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
    moved = corners + moves * (0.08 + 0.02 * u[1]) * side
    perspective = null_space_homography(corners, moved)
    centre = (moved.min(0) + moved.max(0)) / 2
    angle = math.radians(40 * (2 * u[2] - 1))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    frame = np.abs(turn) @ (moved.max(0) - moved.min(0))
    room = np.maximum(frame - side, 0)
    shift = np.floor(u[3:] * (np.floor(room) + 1)) - room / 2
    for x, y in ((-1, -1), (1, -1), (0.3, 0.8)):
        zoomed = 1.5 ** (2 * u[0] - 1) * np.array([x, y]) * side / 2
        point = np.array(mapped(torch.tensor(perspective), *zoomed))
        seen = (turn @ (point - centre) - shift) / (side / 2)  # in the view's coordinates
        assert mapped(torch.tensor(homography), *seen) == pytest.approx([x, y])


def test_every_cell_comes_from_where_its_homography_points() -> None:
    for homography in sample(ViewsConfig(), batch=1)[0]:
        view = warp(ramp(24, 36), homography[None], (6, 9))[0]
        mask = valid_mask(homography[None], (6, 9))[0, 0]
        for j, i in ((0, 0), (2, 7), (5, 8), (3, 4)):
            x, y = mapped(homography, float(centres(9)[i]), float(centres(6)[j]))
            inside = abs(x) <= 1 and abs(y) <= 1
            assert bool(mask[j, i]) == inside
            if abs(x) <= 35 / 36 and abs(y) <= 23 / 24:  # between centres; a ramp is flat outside
                torch.testing.assert_close(view[:, j, i], torch.tensor([x, y]).double())


def test_the_identity_leaves_a_map_as_it_is() -> None:
    maps = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(warp(maps, IDENTITY, (5, 8)), maps, atol=1e-12, rtol=0)
    half = maps.bfloat16()
    torch.testing.assert_close(warp(half, IDENTITY.float(), (5, 8)), half.float())


def test_a_view_and_its_inverse_give_the_map_back_inside() -> None:
    y, x = ramp(48, 72)[0, 1], ramp(48, 72)[0, 0]
    smooth = torch.stack([(2 * x).sin() * y.cos(), (x * y).cos()])[None]
    for homography in sample(ViewsConfig(), batch=1)[0][:, None]:
        there = warp(smooth, homography, (48, 72))
        back = warp(there, torch.linalg.inv(homography), (48, 72))
        inside = warp(valid_mask(homography, (48, 72)), torch.linalg.inv(homography), (48, 72))
        inside = (inside * valid_mask(torch.linalg.inv(homography), (48, 72)) > 0.999)[0, 0]
        assert inside.float().mean() > 0.5
        error = (back - smooth)[0][:, inside].abs()
        assert error.max() < 0.02
        assert error.mean() < 5e-4
        assert (there - smooth).abs().mean() > 0.01


def linspace_warp(maps: Tensor, homography: Tensor) -> Tensor:
    """The public code's convention: -1 and 1 are cell centres here, and edges in the homography."""
    y, x = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in maps.shape[-2:])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return F.grid_sample(maps, (grid + homography[0, :2, 2])[None], align_corners=True)


def test_a_shift_by_one_cell_is_a_roll_as_the_public_grids_are_not() -> None:
    maps = torch.randn(1, 2, 6, 10, dtype=torch.float64)
    right = shifted(2 / 10, 0)
    rolled = maps.roll(-1, 3)[..., :-1]
    torch.testing.assert_close(warp(maps, right, (6, 10))[..., :-1], rolled, atol=1e-12, rtol=0)
    assert (linspace_warp(maps, right)[..., :-1] - rolled).abs().max() > 0.1
    down = shifted(0, 2 / 6)
    rolled = maps.roll(-1, 2)[..., :-1, :]
    torch.testing.assert_close(warp(maps, down, (6, 10))[..., :-1, :], rolled, atol=1e-12, rtol=0)


def test_low_and_high_resolution_agree_on_a_shift_as_the_public_grids_do_not() -> None:
    right = shifted(0.25, 0)

    def gap(low: Tensor, high: Tensor) -> float:
        """Between the shifts, in normalised units, of one low-resolution cell."""
        shifts = [(low - ramp(8, 8))[0, 0, 4, 3], F.avg_pool2d(high - ramp(32, 32), 4)[0, 0, 4, 3]]
        return float((shifts[0] - shifts[1]).abs())

    assert gap(warp(ramp(8, 8), right, (8, 8)), warp(ramp(32, 32), right, (32, 32))) < 1e-12
    assert gap(linspace_warp(ramp(8, 8), right), linspace_warp(ramp(32, 32), right)) > 0.02


def test_beyond_the_border_a_map_is_mirrored_not_black() -> None:
    maps = torch.arange(1.0, 5.0).double().view(1, 1, 1, 4)
    seen = warp(maps, shifted(2 * 2 / 4, 0), (1, 4)).flatten()
    torch.testing.assert_close(seen, torch.tensor([3.0, 4.0, 4.0, 3.0]).double())


def test_a_view_at_the_edge_of_a_white_image_has_no_black_border() -> None:
    white = torch.ones(1, 3, 32, 32)
    views = warp_images(white, shifted(0.5, 0.5)[None], (16, 16))
    torch.testing.assert_close(views, torch.ones(1, 3, 16, 16))


def test_views_of_images_come_image_by_image() -> None:
    images = torch.stack([torch.full((3, 20, 30), 0.1), torch.full((3, 20, 30), 0.9)])
    views = warp_images(images, sample(ViewsConfig(num_views=3)), (8, 12))
    assert views.shape == (6, 3, 8, 12)
    torch.testing.assert_close(views[:, 0, 4, 4], torch.tensor([0.1] * 3 + [0.9] * 3))


def test_images_and_maps_are_warped_alike() -> None:
    # Colours that are their own place: a view of the image holds what the map's view holds.
    colours = (F.pad(ramp(96, 144), (0, 0, 0, 0, 0, 1)) + 1) / 2
    homographies = sample(ViewsConfig(num_views=4), batch=1)
    views = warp_images(colours, homographies, (24, 36))
    maps = warp(colours.expand(4, -1, -1, -1), homographies[0], (24, 36))
    inner = F.pad(valid_mask(homographies[0], (24, 36)), (1, 1, 1, 1))
    inner = (F.avg_pool2d(inner, 3, 1) > 0.99).expand_as(views)
    assert inner.float().mean() > 0.5
    assert (views - maps)[inner].abs().max() < 2e-3  # an average over a cell, against its centre


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
def test_an_image_that_is_shrunk_is_averaged_not_picked_from(factor: int) -> None:
    noise = torch.randn(1, 3, 32 * factor, 32 * factor, generator=seeded()) * 0.1 + 0.5
    size = (32, 32)
    seen = float(warp_images(noise, IDENTITY[None], size).std()) / 0.1
    naive = float(F.interpolate(noise, size, mode="bilinear", align_corners=False).std()) / 0.1
    # Averages of f x f pixels have 1 / f; the triangle that the first resize uses, a little less.
    assert 0.6 / factor < seen < 1.05 / factor
    assert naive == pytest.approx(1.0 if factor % 2 else 0.5, abs=0.05)


@pytest.mark.parametrize("size", [(16, 12), (24, 30), (8, 12), (16, 6), (8, 6)])
def test_a_view_that_does_not_move_is_the_image_and_never_softer_than_an_area_average(
    size: tuple[int, int],
) -> None:
    """The public resampler, a B-spline of weights 1/6, 4/6, 1/6, blurs even that."""
    image = torch.rand(1, 3, 16, 12, generator=seeded())
    due = area_resize(image, size)
    torch.testing.assert_close(warp_images(image, IDENTITY[None], size), due)
    spline = F.conv1d(image.flatten(0, 2)[:, None], torch.tensor([[[1.0, 4.0, 1.0]]]) / 6)
    assert spline.std() < 0.8 * image.std()


def test_the_gradient_of_a_warp_is_exact() -> None:
    homographies = sample(ViewsConfig(num_views=2), batch=1, grid=(4, 5))[0]
    maps = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: warp(m, homographies, (3, 4)), maps)


def test_autocast_does_not_blur_the_places_a_warp_reads() -> None:
    maps, homographies = ramp(40, 64).float(), sample(ViewsConfig(), batch=1)[0, :1].float()
    plain = warp(maps, homographies, (40, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(warp(maps, homographies, (40, 64)), plain)


def test_a_perspective_range_upside_down_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"perspective: expected .* got \[0.05, 0.01\]"):
        ViewsConfig(perspective=(0.05, 0.01))


def test_the_paper_s_views_mostly_show_the_base() -> None:
    views = sample(ViewsConfig(num_views=100), batch=1)[0]
    share = valid_mask(views, (24, 36)).mean((1, 2, 3))
    assert 0.85 < share.mean() < 0.99
    assert share.min() > 0.6


CLOSE = STILL.model_copy(update={"num_views": 5, "close_ups": 3})


def close_ups(config: ViewsConfig, closest: float, batch: int = 40) -> Tensor:
    return sample_homographies(config, batch, (24, 36), seeded(), closest=closest)


def test_close_ups_are_windows_inside_the_base_each_in_its_part_of_the_magnifications() -> None:
    views = close_ups(CLOSE, 4.0)
    torch.testing.assert_close(views[:, :2], IDENTITY.expand(40, 2, 3, 3), atol=1e-12, rtol=0)
    share, place = views[:, 2:, 0, 0], views[:, 2:, :2, 2]
    torch.testing.assert_close(views[:, 2:, 1, 1], share)
    for i in range(3):
        magnified = 1 / share[:, i]
        assert 4 ** (i / 3) <= magnified.min() < 4 ** ((i + 0.2) / 3)
        assert 4 ** ((i + 0.8) / 3) < magnified.max() <= 4 ** ((i + 1) / 3)
    room = (1 - share)[..., None]
    assert (place.abs() <= room + 1e-12).all()
    for edge in (place / room).unbind(-1):  # they reach every place
        assert edge.min() < -0.9
        assert edge.max() > 0.9


def test_close_ups_leave_the_other_views_and_a_factor_of_one_as_they_are() -> None:
    plain = ViewsConfig()
    some = plain.model_copy(update={"close_ups": 2})
    torch.testing.assert_close(close_ups(some, 4.0)[:, :3], close_ups(plain, 4.0)[:, :3])
    torch.testing.assert_close(close_ups(some, 1.0), close_ups(plain, 1.0))
    assert torch.equal(close_ups(plain, 4.0), close_ups(plain, 1.0))
    assert some.magnifications(4.0) == pytest.approx([1, 1, 1, 4**0.25, 4**0.75])


def test_more_close_ups_than_views_are_refused() -> None:
    with pytest.raises(ValidationError, match="close_ups: 3 of 2 views; raise num_views"):
        ViewsConfig(num_views=2, close_ups=3)


def window(magnification: float, x: float, y: float) -> Tensor:
    return torch.diag(torch.tensor([1 / magnification] * 2 + [1.0]).double()) + torch.tensor(
        [[0, 0, x], [0, 0, y], [0, 0, 0]]
    )


def test_a_close_up_of_a_tile_has_the_pixels_of_the_tile() -> None:
    """Not those of a base that was shrunk before, as for a view of the whole."""
    image = torch.rand(2, 3, 64, 48, generator=seeded())
    tile, half = window(4, -0.25, 0.75), window(2, 0.5, -0.5)
    views = torch.stack([tile, IDENTITY[0], half]).expand(2, 3, 3, 3)
    seen = warp_images(image, views, (16, 12), (4.0, 1.0, 2.0)).unflatten(0, (2, 3))
    torch.testing.assert_close(seen[:, 0], image[..., 48:, 12:24])
    torch.testing.assert_close(seen[:, 2], area_resize(image[..., :32, 24:], (16, 12)))
    shrunk = warp_images(image, views, (16, 12)).unflatten(0, (2, 3))
    torch.testing.assert_close(shrunk[:, 1], seen[:, 1])
    assert shrunk[:, 0].std() < 0.6 * seen[:, 0].std()
