"""Which optimiser a recipe builds, and what its weight decay does."""

from typing import Literal

import pytest
import torch
from torch import nn

from distill.engine.optimizer import OptimizerConfig, ParameterGroup, build_optimizer
from distill.tasks.upsampler_recipe import UpsamplerOptimizer


def stepped(
    kind: Literal["adamw", "nadam"], gradients: list[float], weight_decay: float
) -> torch.Tensor:
    """A weight of 2 after a step of 0.1 for each gradient, float64."""
    weight = nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
    group = ParameterGroup("all", [weight], weight_decay)
    optimizer = build_optimizer(OptimizerConfig(kind=kind, lr=0.1), [group])
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return weight.detach()


def test_nadam_is_dozat_s_with_its_decay_in_the_gradient() -> None:
    gradients, decay = [0.3, -0.5, 0.2], 0.01
    weight, m, v, product = 2.0, 0.0, 0.0, 1.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient + decay * weight
        mu, following = (0.9 * (1 - 0.5 * 0.96 ** (s * 4e-3)) for s in (t, t + 1))
        product *= mu
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        root = (v / (1 - 0.999**t)) ** 0.5 + 1e-8
        nesterov = (1 - mu) * g / (1 - product) + following * m / (1 - product * following)
        weight -= 0.1 * nesterov / root
    assert float(stepped("nadam", gradients, decay)) == pytest.approx(
        weight, rel=1e-8
    )  # it counts in float32


def test_adamw_decays_apart_from_the_gradient() -> None:
    assert float(stepped("adamw", [0.0], 0.5)) == pytest.approx(2 * (1 - 0.1 * 0.5))
    assert float(stepped("nadam", [0.0], 0.5)) < 1.95  # a whole step, as for any gradient


def test_upsamplers_are_trained_with_nadam() -> None:
    assert UpsamplerOptimizer().kind == "nadam"
