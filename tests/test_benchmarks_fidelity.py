"""Fidelity and cosines against closed forms and a slow float64 reference."""

import json
import math

import pytest
import torch

from distill.benchmarks.fidelity import MAX_FIDELITY, Agreement, AgreementPass
from teachers.features import Features


def _agreement(head: torch.Tensor, target: torch.Tensor) -> Agreement:
    measured = AgreementPass()
    measured.update(Features(None, head), Features(None, target))
    return measured.finish()


def _maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_predicting_the_mean_has_fidelity_1() -> None:
    target = _maps(0, 5, 6, 7, 8) * torch.arange(1, 7)[:, None, None] + 3
    mean = target.mean((0, 2, 3), keepdim=True).expand_as(target)
    assert _agreement(mean, target).fidelity == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_noise_of_std_s_on_standardised_maps_has_fidelity_1_over_s_squared(std: float) -> None:
    target = _maps(0, 8, 16, 32, 32)
    noisy = target + std * _maps(1, 8, 16, 32, 32)
    assert _agreement(noisy, target).fidelity == pytest.approx(1 / std**2, rel=0.02)


def test_fidelity_is_the_same_in_any_rotated_shifted_and_scaled_space() -> None:
    target, head = _maps(0, 2, 6, 4, 5).double(), _maps(1, 2, 6, 4, 5).double()
    rotation, _ = torch.linalg.qr(_maps(2, 6, 6).double())

    def moved(x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.einsum("ij,bjhw->bihw", rotation, x) + 7

    expected = _agreement(head, target).fidelity
    assert _agreement(moved(head), moved(target)).fidelity == pytest.approx(expected, rel=1e-5)


def test_batches_of_any_size_give_a_slow_reference_over_all_cells() -> None:
    head, target = _maps(0, 7, 4, 3, 5), _maps(1, 7, 4, 3, 5)
    a, b = _maps(2, 7, 9), _maps(3, 7, 9)
    measured = AgreementPass()
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        measured.update(Features(a[part], head[part]), Features(b[part], target[part]))
    s = head.double().permute(0, 2, 3, 1).reshape(-1, 4).tolist()
    t = target.double().permute(0, 2, 3, 1).reshape(-1, 4).tolist()
    mean = [math.fsum(row[c] for row in t) / len(t) for c in range(4)]
    variance = math.fsum((row[c] - mean[c]) ** 2 for row in t for c in range(4))
    error = math.fsum((x[c] - y[c]) ** 2 for x, y in zip(s, t, strict=True) for c in range(4))

    def cosine(rows: list, others: list) -> float:
        pairs = [
            sum(i * j for i, j in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)
            for x, y in zip(rows, others, strict=True)
        ]
        return math.fsum(pairs) / len(pairs)

    cosines = cosine(s, t), cosine(a.tolist(), b.tolist())
    expected = (variance / error, *cosines, error / len(t) / 4)
    assert measured.finish() == pytest.approx(expected, rel=1e-6)


def test_maps_are_compared_on_the_smaller_grid_whichever_side_has_it() -> None:
    coarse, fine = _maps(0, 2, 3, 4, 6), _maps(1, 2, 3, 8, 18)
    small = torch.nn.functional.interpolate(fine, (4, 6), mode="bilinear", antialias=True)
    assert _agreement(fine, coarse) == _agreement(small, coarse)
    assert _agreement(coarse, fine) == _agreement(coarse, small)


def test_equal_maps_have_the_largest_fidelity_which_is_a_number_in_json() -> None:
    equal = _agreement(_maps(0, 1, 3, 2, 2), _maps(0, 1, 3, 2, 2))
    assert equal.fidelity == MAX_FIDELITY == json.loads(json.dumps(equal, allow_nan=False))[0]


def test_a_map_that_differs_in_its_last_bits_is_below_the_largest_fidelity() -> None:
    maps = _maps(0, 4, 8, 6, 6)
    assert 2**40 < _agreement(maps * (1 + 2.0**-22), maps).fidelity < MAX_FIDELITY


def test_maps_that_are_not_finite_are_refused() -> None:
    maps = _maps(0, 1, 3, 2, 2)
    with pytest.raises(RuntimeError, match="the maps are not finite"):
        _agreement(maps / 0, maps)


def test_a_teacher_without_summary_has_no_summary_cosine() -> None:
    assert _agreement(_maps(0, 1, 3, 2, 2), _maps(1, 1, 3, 2, 2)).summary_cosine is None


def test_no_images_have_no_agreement() -> None:
    with pytest.raises(RuntimeError, match="no images"):
        AgreementPass().finish()
