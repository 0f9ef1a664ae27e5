"""Losses against hand-computed values and invariants."""

import math

import pytest
import torch

from distill.objective.losses import (
    angle_summary_loss,
    angles,
    cosine_smooth_l1_spatial_loss,
    cosine_summary_loss,
    match_grids,
    mse_spatial_loss,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)


def test_summary_losses_vanish_at_any_positive_multiple(pair: tuple[torch.Tensor, ...]) -> None:
    x, _ = pair
    assert cosine_summary_loss(3 * x, x) == pytest.approx(0, abs=1e-6)
    assert angle_summary_loss(3 * x, x, torch.tensor(1.0)) == pytest.approx(0, abs=3e-6)


def test_summary_losses_ignore_scale(pair: tuple[torch.Tensor, ...]) -> None:
    x, y = pair
    one = torch.tensor(1.0)
    torch.testing.assert_close(cosine_summary_loss(5 * x, y), cosine_summary_loss(x, 7 * y))
    torch.testing.assert_close(angle_summary_loss(5 * x, y, one), angle_summary_loss(x, 7 * y, one))


def test_cosine_loss_of_known_angles() -> None:
    prediction = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([[0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    expected = (1 + 2 + (1 - math.sqrt(0.5))) / 3
    assert cosine_summary_loss(prediction, target) == pytest.approx(expected)


def test_angle_loss_of_known_angles() -> None:
    prediction = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    expected = ((math.pi / 2) ** 2 + (math.pi / 4) ** 2) / 2 / 0.5
    assert angle_summary_loss(prediction, target, torch.tensor(0.5)) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_angle_gradient_is_finite_at_equality_and_opposition(sign: float) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    angle_summary_loss(x, sign * x.detach(), torch.tensor(1.0)).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_predicting_the_mean_direction_costs_one_dispersion() -> None:
    y = torch.randn(500, 8, generator=torch.Generator().manual_seed(2)) + 2
    mean = torch.nn.functional.normalize(y, dim=1).mean(0)
    dispersion = angles(y, mean.expand_as(y)).square().mean()
    assert angle_summary_loss(mean.expand_as(y), y, dispersion) == pytest.approx(1.0)


def test_predicting_zero_on_standardised_maps_costs_one() -> None:
    y = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    y = (y - y.mean()) / y.std(unbiased=False)
    assert mse_spatial_loss(torch.zeros_like(y), y) == pytest.approx(1.0, rel=1e-5)


def test_cosine_smooth_l1_matches_a_slow_float64_loop() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) * 3
    y = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) * 3
    cosines, smooth = [], []
    for b in range(2):
        for i in range(2):
            for j in range(4):
                a, c = x[b, :, i, j].tolist(), y[b, :, i, j].tolist()
                dot = sum(p * q for p, q in zip(a, c, strict=True))
                cosines.append(1 - dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in c)))
                for p, q in zip(a, c, strict=True):
                    d = abs(p - q)
                    smooth.append(d * d / 4 if d < 2 else d - 1)
    expected = 0.9 * sum(cosines) / len(cosines) + 0.1 * sum(smooth) / len(smooth)
    assert cosine_smooth_l1_spatial_loss(x, y) == pytest.approx(expected)


def test_equal_grids_pass_untouched() -> None:
    x, y = torch.rand(1, 2, 3, 5), torch.rand(1, 2, 3, 5)
    px, py = match_grids(x, y)
    assert px is x
    assert py is y


def test_grids_meet_at_the_smaller_side_of_each_axis() -> None:
    x, y = match_grids(torch.rand(1, 2, 8, 5), torch.rand(1, 2, 4, 10))
    assert x.shape == y.shape == (1, 2, 4, 5)


def test_halving_a_grid_antialiases() -> None:
    """Halving with antialiasing keeps less of white noise than sampling does (0.5 in std)."""
    noise = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(5))
    _, small = match_grids(torch.zeros(1, 1, 128, 128), noise)
    # The triangle filter of width 2 has taps (1, 3, 3, 1) / 8 per axis: 20 / 64 of the variance.
    assert small.std() == pytest.approx(20 / 64, rel=0.05)
