"""Losses of depth against slow counts by hand."""

import math

import pytest
import torch
from torch import Tensor

from distill.benchmarks.dense.depth import gradient_loss, sig_loss


def test_sigloss_is_that_of_the_logarithms_and_of_their_mean_alone_at_first() -> None:
    prediction, truth = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 2.0, 4.0])
    g = [math.log(p + 1e-3) - math.log(t + 1e-3) for p, t in ((1, 2), (2, 2), (5, 4))]
    mean = math.fsum(g) / 3
    variance = math.fsum((x - mean) ** 2 for x in g) / 3
    known = torch.ones(3, dtype=torch.bool)
    early = [float(sig_loss(prediction, truth, known, step)) for step in (0, 99)]
    late = float(sig_loss(prediction, truth, known, 100))
    assert early == pytest.approx([math.sqrt(0.15 * mean**2)] * 2, rel=1e-4)
    assert late == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)


def test_sigloss_leaves_out_unknown_depth_and_has_a_slope_everywhere() -> None:
    prediction = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    truth = torch.tensor([1.0, 2.0, 0.0])
    for step in (0, 100):
        (slope,) = torch.autograd.grad(sig_loss(prediction, truth, truth > 0, step), prediction)
        assert slope.isfinite().all()
        assert slope[2] == 0
    nothing = torch.zeros(3, dtype=torch.bool)
    assert sig_loss(prediction, truth, nothing, 0) == 0


def maps(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


def slow_gradient_loss(prediction: Tensor, truth: Tensor) -> float:
    """Pixel by pixel, at every 1st, 2nd, 4th and 8th of them; truth of 0 is unknown."""
    total = 0.0
    for stride in (1, 2, 4, 8):
        terms, known = [], 0
        for p, t in zip(prediction, truth, strict=True):
            for y in range(0, p.shape[0], stride):
                for x in range(0, p.shape[1], stride):
                    if t[y, x] == 0:
                        continue
                    known += 1
                    for v, u in ((y + stride, x), (y, x + stride)):
                        if v < p.shape[0] and u < p.shape[1] and t[v, u] > 0:
                            a, b = ((m[v, u] + 1e-3) / (m[y, x] + 1e-3) for m in (p, t))
                            terms.append(abs(math.log(a) - math.log(b)))
        total += math.fsum(terms) / known
    return total


def test_the_term_of_gradients_is_that_of_a_slow_count_where_depth_is_known() -> None:
    prediction, truth = maps(2, 2, 1, 19, 13)
    truth[:, :, 3:6, 2:9] = 0
    came = gradient_loss(prediction, truth, truth > 0)
    assert float(came) == pytest.approx(slow_gradient_loss(prediction[:, 0], truth[:, 0]), rel=1e-9)


def test_the_term_of_gradients_forgives_a_common_factor_and_sees_a_blurred_edge() -> None:
    truth = torch.ones(1, 1, 16, 16)
    truth[..., 8:] = 4
    known = torch.ones_like(truth, dtype=torch.bool)
    assert (
        float(gradient_loss(3 * truth, truth, known)) < 0.01
    )  # but for the constant in logarithms
    blurred = truth.clone()
    blurred[..., 7:9] = 2.5
    assert float(gradient_loss(blurred, truth, known)) > 0.1


def test_the_term_of_gradients_has_finite_slopes_and_none_at_unknown_pixels() -> None:
    prediction = maps(1, 1, 9, 9).requires_grad_()
    truth = maps(1, 1, 9, 9).flip(-1)
    truth[..., :2, :] = 0
    with torch.no_grad():
        prediction[..., 0, 0] = -5  # outside of the logarithm's domain
    (slope,) = torch.autograd.grad(gradient_loss(prediction, truth, truth > 0), prediction)
    assert slope.isfinite().all()
    assert (slope[truth == 0] == 0).all()
    assert slope.abs().max() > 0


def test_the_term_of_gradients_of_nothing_known_is_zero() -> None:
    prediction = maps(1, 1, 3, 2)
    assert gradient_loss(prediction, torch.zeros_like(prediction), prediction < 0) == 0
