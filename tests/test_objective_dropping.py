"""Teacher dropping: who stays, how often, and what an image counts."""

import pytest
import torch

from distill.objective.weighting import kept_shares

LOSSES = [
    torch.tensor([3.0, 1.0, 2.0]),
    torch.tensor([1.0, 5.0, 2.5]),
    torch.tensor([2.0, 2.0, 9.0]),
]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_worst_matched_teacher_of_each_image_always_stays() -> None:
    for _ in range(50):
        shares = torch.stack(kept_shares(LOSSES, 0.9, seeded()))
        assert (shares[[0, 1, 2], [0, 1, 2]] > 0).all()


def test_the_others_stay_with_their_probability_and_independently() -> None:
    losses = [torch.full((20_000,), value) for value in (9.0, 1.0, 2.0)]
    worst, one, other = (share > 0 for share in kept_shares(losses, 0.3, seeded()))
    assert worst.all()
    assert one.double().mean().item() == pytest.approx(0.7, abs=0.015)
    assert (one & other).double().mean().item() == pytest.approx(0.49, abs=0.015)


def test_an_image_counts_the_same_whatever_was_dropped() -> None:
    shares = torch.stack(kept_shares([torch.rand(500) for _ in range(4)], 0.5, seeded()))
    torch.testing.assert_close(shares.sum(0), torch.full((500,), 4.0))
    for image in shares.T:
        kept = image[image > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 4 / len(kept)))


def test_one_teacher_is_never_dropped() -> None:
    assert kept_shares([torch.rand(9)], 0.9, seeded())[0].tolist() == [1.0] * 9
