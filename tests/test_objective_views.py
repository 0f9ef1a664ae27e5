"""Shifted and warped views: exact slices, their distribution, masks (C-RADIOv4, 2601.17237)."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from distill.objective.losses import mse_spatial_loss
from distill.objective.views import (
    Pair,
    ShiftConfig,
    ShiftedViews,
    Views,
    WarpConfig,
    WarpedViews,
    build_views,
    central_crop,
    frame_size,
)
from distill.runtime import distributed

PATCH = 4
SHIFT = ShiftConfig(kind="shift", std=1.0)
WARP = WarpConfig(kind="homography")
STILL = WARP.model_copy(update={"rotation_degrees": 0.0, "perspective": (0.0, 0.0), "flip": 0.0})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted(
    batch: int = 8, tokens: tuple[int, int] = (3, 5), config: ShiftConfig = SHIFT
) -> tuple[Tensor, ShiftedViews]:
    """Frames with a colour of its own in each pixel, and views of them."""
    size = frame_size(config, (tokens[0] * PATCH, tokens[1] * PATCH), PATCH)
    frames = torch.rand(batch, 3, *size, generator=seeded(1))
    return frames, ShiftedViews(frames, config, PATCH, ["a", "b"], seeded())


def encode(images: Tensor, density: int = 1) -> Tensor:
    """A curved feature of each patch, or of each of `density` x `density` parts of it."""
    side = PATCH // density
    weight = torch.randn(6, 3, side, side, generator=seeded(2))
    return F.conv2d(images, weight, stride=side).sin()


def test_every_view_is_a_crop_of_its_frame_some_whole_patches_aside() -> None:
    frames, views = shifted()
    assert len({tuple(shift) for shift in views.shifts["a"]}) > 3  # each image its own
    assert views.shifts["a"] != views.shifts["b"]
    for name in ("a", "b"):
        for frame, crop, (dy, dx) in zip(frames, views.of(name), views.shifts[name], strict=True):
            assert max(abs(dy), abs(dx)) <= SHIFT.limit
            top, left = (2 + dy) * PATCH, (2 + dx) * PATCH
            assert torch.equal(crop, frame[:, top : top + 12, left : left + 20])
    assert torch.equal(views.student, frames[:, :, 8:-8, 8:-8])
    assert torch.equal(views.student, central_crop(SHIFT, frames, PATCH))


@pytest.mark.parametrize("density", [1, 2])
def test_a_student_that_copies_a_displaced_teacher_is_exactly_right(density: int) -> None:
    """On as many cells as both see, for heads and teachers denser than the tokens too."""
    _, views = shifted()
    maps = encode(views.student, density), encode(views.of("a"), density)
    for (x, y), (dy, dx) in zip(views.pairs("a", *maps), views.shifts["a"], strict=True):
        assert x.shape[2:] == (density * (3 - abs(dy)), density * (5 - abs(dx)))
        assert torch.equal(x, y)


@pytest.mark.parametrize(("head", "teacher"), [(2, 1), (1, 2), (2, 4)])
def test_maps_of_other_densities_show_the_same_places(head: int, teacher: int) -> None:
    """A map of each cell's place in the frame: resizing keeps it, but for cells at a border."""
    _, views = shifted(tokens=(7, 9))
    views._frames = places(views._frames)
    student = central_crop(SHIFT, views._frames, PATCH)
    prediction = F.avg_pool2d(student, PATCH // head)
    target = F.avg_pool2d(views.of("a"), PATCH // teacher)
    common = min(head, teacher)
    for (x, y), (dy, dx) in zip(
        views.pairs("a", prediction, target), views.shifts["a"], strict=True
    ):
        assert x.shape == y.shape == (1, 3, common * (7 - abs(dy)), common * (9 - abs(dx)))
        torch.testing.assert_close(x[..., 1:-1, 1:-1], y[..., 1:-1, 1:-1])


def places(images: Tensor) -> Tensor:
    """Each pixel's own place, in the shape of the images."""
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in images.shape[-2:]), indexing="ij")
    return torch.stack([y, x, y + x]).expand_as(images).contiguous()


def test_slices_hold_the_cells_of_the_definition() -> None:
    """X[u + d] beside Y[u], for every u where both exist, cell by cell."""
    _, views = shifted()
    x, y = torch.randn(8, 2, 3, 5, generator=seeded(3)), torch.randn(8, 2, 3, 5)
    for image, (pair, (dy, dx)) in enumerate(
        zip(views.pairs("b", x, y), views.shifts["b"], strict=True)
    ):
        cells = [
            (x[image, :, i + dy, j + dx], y[image, :, i, j])
            for i in range(3)
            for j in range(5)
            if 0 <= i + dy < 3 and 0 <= j + dx < 5
        ]
        assert pair.target.shape[2] * pair.target.shape[3] == len(cells)
        if cells:
            ours = torch.stack([x for x, _ in cells], 1), torch.stack([y for _, y in cells], 1)
            assert torch.equal(pair.prediction[0].flatten(1), ours[0])
            assert torch.equal(pair.target[0].flatten(1), ours[1])


def test_shifts_follow_the_published_law() -> None:
    """round(N(0, 0.5)): P(0) = erf(0.5 / (0.5 sqrt 2)) = 0.683, P(1) = 0.157, P(2) = 0.0013."""
    config = ShiftConfig(kind="shift")
    frames = torch.zeros(40_000, 1, 5, 5)
    views = ShiftedViews(frames, config, 1, ["a"], seeded())
    shifts = torch.tensor(views.shifts["a"])
    for value, share in {0: 0.6827, 1: 0.1573, -1: 0.1573, 2: 0.00135, -2: 0.00135}.items():
        sigma = (share * (1 - share) / shifts.numel()) ** 0.5
        assert abs((shifts == value).double().mean() - share) < 4 * sigma
    both = (shifts.double().T @ shifts.double() / len(shifts))[0, 1]
    assert abs(both) < 4 * 0.33 / 200  # the axes are independent


def test_a_shift_beyond_the_frame_is_none() -> None:
    config = ShiftConfig(kind="shift", std=2.0, limit=1)
    _, views = shifted(2000, (2, 2), config)
    shifts = torch.tensor(views.shifts["a"])
    assert shifts.abs().max() == 1
    # P(|k| <= 1) for round(N(0, 2)) is erf(1.5 / (2 sqrt 2)) = 0.547; of it 0 has 0.197.
    expected = 0.197 + 1 - 0.547
    assert (shifts == 0).double().mean().item() == pytest.approx(expected, abs=0.03)


def test_a_grid_that_is_no_multiple_of_the_tokens_is_interpolated() -> None:
    """Maps of each cell's place in the frame agree, two cells from a border on."""
    frames, views = shifted(6, (12, 16))
    views._frames = places(frames)
    student = central_crop(SHIFT, views._frames, PATCH)
    prediction = F.avg_pool2d(student, PATCH)
    target = F.interpolate(views.of("a"), (8, 12), mode="bilinear", antialias=True)
    cell = torch.tensor([48 / 8, 64 / 12]).view(1, 2, 1, 1)
    for (p, t), shift in zip(views.pairs("a", prediction, target), views.shifts["a"], strict=True):
        rows, columns = (
            # Centres (i + 0.5) of the student's cells that are inside of the teacher's crop.
            sum(0 <= (i + 0.5) / n - d / tokens <= 1 for i in range(n))
            for n, d, tokens in zip((8, 12), shift, (12, 16), strict=True)
        )
        assert p.shape == t.shape == (1, 3, rows * columns, 1)
        here = p[:, :2] - 8  # pixels in the student's crop
        there = here - PATCH * torch.tensor(shift).view(1, 2, 1, 1)
        size = torch.tensor([48, 64]).view(1, 2, 1, 1)
        deep = [(x > 2 * cell) & (x < size - 2 * cell) for x in (here, there)]
        chosen = (deep[0] & deep[1]).all(1)[0, :, 0]
        assert chosen.sum() >= 6
        # Torch's antialias moves a place by up to 3 % of a cell; a token is 4 pixels.
        torch.testing.assert_close(p[:, :, chosen], t[:, :, chosen], atol=0.25, rtol=0)


def sampled(batch: int, grid: tuple[int, int], config: WarpConfig) -> WarpedViews:
    images = torch.rand(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=seeded(1))
    return WarpedViews(images, config, PATCH, seeded())


def test_a_homography_that_does_not_move_changes_nothing() -> None:
    views = sampled(3, (3, 5), STILL)
    torch.testing.assert_close(views.student, views.of("a"), atol=1e-5, rtol=0)
    maps = torch.randn(3, 6, 3, 5)
    for image, (x, y) in enumerate(views.pairs("a", maps, maps)):
        assert torch.equal(x[0, :, :, 0], maps[image].flatten(1))
        torch.testing.assert_close(y, x, atol=1e-5, rtol=0)


def test_a_mirrored_view_is_compared_cell_by_mirrored_cell() -> None:
    views = sampled(3, (3, 5), STILL.model_copy(update={"flip": 1.0}))
    torch.testing.assert_close(views.student, views.of("a").flip(3), atol=1e-5, rtol=0)
    maps = torch.randn(3, 6, 3, 5)
    for image, (_, y) in enumerate(views.pairs("a", torch.zeros_like(maps), maps)):
        expected = maps[image].flip(2).flatten(1)
        torch.testing.assert_close(y[0, :, :, 0], expected, atol=1e-5, rtol=0)


def test_the_share_of_mirrored_images_is_the_recipes() -> None:
    views = sampled(500, (1, 1), STILL.model_copy(update={"flip": 0.3}))
    mirrored = (views.homographies[:, 0, 0] < 0).double().mean().item()
    assert mirrored == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("teacher", [(12, 16), (6, 8), (24, 32)])
def test_a_warped_view_meets_its_places_in_the_image(teacher: tuple[int, int]) -> None:
    """Maps that hold each cell's own place in the image: what a pair holds must agree."""
    views = sampled(4, (12, 16), WARP)
    grid = (min(12, teacher[0]), min(16, teacher[1]))
    centres = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in grid]
    y, x = torch.meshgrid(*centres, indexing="ij")
    ours = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    own = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in teacher]
    map_y, map_x = torch.meshgrid(*own, indexing="ij")
    target = torch.stack([map_x, map_y]).expand(4, -1, -1, -1)
    seen = torch.stack([(p := h @ ours)[:2] / p[2] for h in views.homographies])
    prediction = seen.unflatten(2, grid).float()
    pairs = views.pairs("a", prediction, target.float())
    for (p, t), place in zip(pairs, seen, strict=True):
        inside = (place.abs() <= 1).all(0)
        assert p.shape == (1, 2, int(inside.sum()), 1)
        assert inside.sum() > 0.6 * inside.numel()
        # In the outermost cells antialias and interpolation mirror.
        step = torch.tensor([2 / grid[1], 2 / grid[0]]).view(1, 2, 1, 1) * 1.51
        deep = (p.abs() + step <= 1).all(1)[0, :, 0]
        torch.testing.assert_close(p[:, :, deep], t[:, :, deep], atol=2e-3, rtol=0)


def test_a_warped_view_and_its_inverse_undo_each_other() -> None:
    views = sampled(4, (12, 16), WARP)
    back = views.homographies.inverse() @ views.homographies
    torch.testing.assert_close(
        back / back[:, 2:, 2:], torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    )


def test_the_gradient_reaches_the_compared_cells_only() -> None:
    views = sampled(2, (12, 16), WARP)
    prediction = torch.randn(2, 3, 12, 16, requires_grad=True)
    pairs = views.pairs("a", prediction, torch.randn(2, 3, 12, 16))
    sum(mse_spatial_loss(*pair) for pair in pairs).backward()  # type: ignore[union-attr]
    assert prediction.grad is not None
    touched = (prediction.grad != 0).any(1).flatten(1).sum(1)
    assert touched.tolist() == [pair.target.shape[2] for pair in pairs]
    assert touched.min() < 12 * 16


@pytest.mark.parametrize("config", [None, SHIFT, WARP])
def test_one_seed_gives_one_set_of_views_and_leaves_the_default_generator(
    config: ShiftConfig | WarpConfig | None,
) -> None:
    images = torch.rand(3, 3, 28, 36)

    def draw(seed: int) -> tuple[Views, Tensor]:
        torch.manual_seed(seed)
        generator = distributed.derived_generator("views")
        return build_views(config, images, PATCH, ["a"], generator), torch.rand(2)

    (one, after), (same, _), (other, _) = draw(0), draw(0), draw(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(2))
    assert torch.equal(one.of("a"), same.of("a"))
    assert torch.equal(one.student, same.student)
    differs = not torch.equal(one.of("a"), other.of("a")) or not torch.equal(
        one.student, other.student
    )
    assert differs == (config is not None)


def test_without_views_of_their_own_all_see_the_images_themselves() -> None:
    images, maps = torch.rand(2, 3, 8, 12), torch.rand(2, 4, 2, 3)
    views = build_views(None, images, PATCH, ["a"], seeded())
    assert views.student is images
    assert views.of("a") is images
    assert views.pairs("a", maps, maps) == [Pair(maps, maps)]
    assert frame_size(None, (8, 12), PATCH) == frame_size(WARP, (8, 12), PATCH) == (8, 12)
    assert central_crop(None, images, PATCH) is images


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ShiftConfig, {"kind": "shift", "std": 0}, "greater than 0"),
        (ShiftConfig, {"kind": "shift", "limit": 0}, "greater than 0"),
        (
            WarpConfig,
            {"kind": "homography", "perspective": (0.05, 0.01)},
            "expected .least, largest",
        ),
        (WarpConfig, {"kind": "homography", "flip": 2}, "less than or equal to 1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    kind: type[ShiftConfig | WarpConfig], options: dict[str, Sequence[float]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(options)
