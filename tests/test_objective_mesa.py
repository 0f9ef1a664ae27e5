"""Agreement with the moving average: the formula, what it ignores, and whom it moves."""

import pytest
import torch
from torch import Tensor

from distill.objective.mesa import EMA, mesa_loss
from distill.objective.views import ShiftConfig, ShiftedViews, build_views

CONFIG = ShiftConfig(kind="shift", std=1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views() -> ShiftedViews:
    found = build_views(CONFIG, torch.rand(4, 3, 28, 36), 4, [EMA], seeded())
    assert isinstance(found, ShiftedViews)
    return found


def maps(seed: int) -> Tensor:
    return torch.randn(4, 6, 3, 5, generator=seeded(seed))


def test_it_is_the_formula_in_float64_over_the_cells_that_both_see() -> None:
    drawn, x, y = views(), maps(1), maps(2)

    def normalised(cell: Tensor) -> Tensor:
        cell = cell.double()
        return (cell - cell.mean()) / (cell.var(unbiased=False) + 1e-5).sqrt()

    losses = []
    for image, (dy, dx) in enumerate(drawn.shifts[EMA]):
        errors = [
            (normalised(x[image, :, i + dy, j + dx]) - normalised(y[image, :, i, j]))
            .square()
            .mean()
            for i in range(3)
            for j in range(5)
            if 0 <= i + dy < 3 and 0 <= j + dx < 5
        ]
        losses.append(torch.stack(errors).mean())
    expected = torch.stack(losses).mean().float()
    torch.testing.assert_close(mesa_loss(x, y, drawn.pairs), expected)


def test_a_displaced_average_of_the_same_features_costs_nothing_at_any_scale() -> None:
    drawn = views()
    x = torch.nn.functional.conv2d(drawn.student, torch.randn(6, 3, 4, 4), stride=4)
    y = torch.nn.functional.conv2d(drawn.of(EMA), torch.randn(6, 3, 4, 4), stride=4)
    assert mesa_loss(x, y, drawn.pairs) > 0.1
    weight = torch.randn(6, 3, 4, 4)
    x, y = (
        torch.nn.functional.conv2d(images, weight, stride=4)
        for images in (drawn.student, drawn.of(EMA))
    )
    assert mesa_loss(5 * x + 3, y, drawn.pairs) == pytest.approx(0, abs=1e-3)


def test_unrelated_maps_cost_two() -> None:
    """E (a - b)^2 = 2 for independent a and b of variance 1."""
    x, y = (torch.randn(8, 64, 6, 6, generator=seeded(s)) for s in (1, 2))
    same = build_views(None, torch.rand(8, 3, 24, 24), 4, [], seeded())
    assert mesa_loss(x, y, same.pairs) == pytest.approx(2, abs=0.05)
