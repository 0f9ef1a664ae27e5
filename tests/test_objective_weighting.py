"""Running means of losses, and what they make of the weights."""

import pytest
import torch
from torch import Tensor

from distill.objective.weighting import Balancing, BalancingConfig
from distill.runtime import distributed
from tests.ranks import run_on_ranks


def follow(values: list[float], decay: float = 0.9) -> list[float]:
    """The factor after each step of one pass."""
    balancing, found = Balancing(BalancingConfig(decay=decay)), []
    for value in values:
        balancing.add({"a": torch.tensor(value)}, {"a": 1.0})
        balancing.finish_step()
        found.append(float(balancing.factors().get("a", 1.0)))
    return found


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
        balancing.add(losses, dict.fromkeys(losses, 1.0))
        balancing.finish_step()
    factors = balancing.factors()
    assert [float(losses[n] * factors[n]) for n in losses] == pytest.approx([1, 1], rel=1e-4)


def test_a_step_weighs_by_the_steps_before_it_however_it_is_cut() -> None:
    whole, cut = (Balancing(BalancingConfig(decay=0.5)) for _ in range(2))
    assert whole.factors() == {}
    for value in (6.0, 2.0):
        whole.add({"a": torch.tensor(value)}, {"a": 1.0})
        for share, part in ((0.25, value + 3), (0.75, value - 1)):
            cut.add({"a": share * torch.tensor(part)}, {"a": share})
            assert cut.factors() == whole.factors()
        whole.finish_step()
        cut.finish_step()
    assert float(whole.factors()["a"]) == pytest.approx(1 / 4)
    whole.finish_step()  # nothing has happened since
    assert float(whole.factors()["a"]) == pytest.approx(1 / 4)


def test_a_loss_that_is_silent_or_not_finite_is_not_followed() -> None:
    assert follow([4.0, float("nan"), float("inf")]) == pytest.approx([0.25] * 3)
    assert follow([float("nan"), 4.0]) == pytest.approx([1, 0.25])
    balancing = Balancing(BalancingConfig())
    balancing.add({"a": torch.tensor(0.0)}, {"a": 0.0})
    balancing.finish_step()
    assert balancing.factors() == {}


def test_no_gradient_goes_through_the_factor() -> None:
    balancing = Balancing(BalancingConfig())
    balancing.add({"a": torch.tensor(4.0, requires_grad=True)}, {"a": 1.0})
    balancing.finish_step()
    assert not balancing.factors()["a"].requires_grad


def factor_of_this_rank(shares: tuple[float, float]) -> Tensor:
    balancing, share = Balancing(BalancingConfig()), shares[distributed.rank()]
    balancing.add({"a": share * torch.tensor(1.0 + 2 * distributed.rank())}, {"a": share})
    balancing.finish_step()
    return balancing.factors()["a"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("shares", "mean"), [((0.5, 0.5), 2.0), ((0.25, 0.75), 2.5), ((0.0, 0.3), 3.0)]
)
def test_every_rank_weighs_by_the_mean_over_all_that_speak(
    shares: tuple[float, float], mean: float
) -> None:
    factors = run_on_ranks(2, factor_of_this_rank, shares)
    assert [float(f) for f in factors] == pytest.approx([1 / mean, 1 / mean])
