"""Running means of losses, and what they make of the weights."""

import pytest
import torch
from torch import Tensor

from distill import distributed
from distill.balancing import Balancing, BalancingConfig
from tests.ranks import run_on_ranks


def follow(values: list[float], decay: float = 0.9) -> list[float]:
    balancing = Balancing(BalancingConfig(decay=decay))
    return [float(balancing({"a": torch.tensor(value)}, {"a": 1.0})["a"]) for value in values]


def test_the_factor_is_one_over_the_running_mean() -> None:
    mean, expected = 4.0, []
    for value in (4.0, 2.0, 8.0):
        mean = 0.9 * mean + 0.1 * value
        expected.append(1 / mean)
    assert follow([4.0, 2.0, 8.0]) == pytest.approx(expected)


def test_constant_losses_of_any_size_count_alike() -> None:
    balancing = Balancing(BalancingConfig())
    losses = {"small": torch.tensor(1e-3), "large": torch.tensor(50.0)}
    for _ in range(5):
        factors = balancing(losses, dict.fromkeys(losses, 1.0))
    assert [float(losses[n] * factors[n]) for n in losses] == pytest.approx([1, 1], rel=1e-4)


def test_a_loss_that_is_not_finite_is_not_followed() -> None:
    assert follow([4.0, float("nan"), float("inf")]) == pytest.approx([0.25] * 3)
    assert follow([float("nan"), 4.0]) == pytest.approx([1, 0.25])


def test_no_gradient_goes_through_the_factor() -> None:
    loss = torch.tensor(4.0, requires_grad=True)
    factor = Balancing(BalancingConfig())({"a": loss}, {"a": 1.0})["a"]
    assert not factor.requires_grad


def factor_of_this_rank(shares: tuple[float, float]) -> Tensor:
    balancing, share = Balancing(BalancingConfig()), shares[distributed.rank()]
    return balancing({"a": share * torch.tensor(1.0 + 2 * distributed.rank())}, {"a": share})["a"]


@pytest.mark.parametrize(
    ("shares", "mean"), [((0.5, 0.5), 2.0), ((0.25, 0.75), 2.5), ((0.0, 0.3), 3.0)]
)
def test_every_rank_weighs_by_the_mean_over_all_that_speak(
    shares: tuple[float, float], mean: float
) -> None:
    factors = run_on_ranks(2, factor_of_this_rank, shares)
    assert [float(f) for f in factors] == pytest.approx([1 / mean, 1 / mean])


def test_a_loss_that_is_silent_everywhere_is_not_followed() -> None:
    balancing = Balancing(BalancingConfig(decay=0.9))
    balancing({"a": torch.tensor(4.0)}, {"a": 1.0})
    assert float(balancing({"a": torch.tensor(0.0)}, {"a": 0.0})["a"]) == pytest.approx(0.25)
