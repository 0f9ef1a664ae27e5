"""Total variation, sampled CRF and MMD against their definitions, pair by pair."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from teachers.upsamplers import regularisers
from teachers.upsamplers.regularisers import (
    maximum_mean_discrepancy,
    sampled_crf,
    total_variation,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def test_total_variation_is_the_smooth_l1_distance_of_neighbours() -> None:
    maps, weights = 2 * random(2, 3, 4, 5), random(2, 1, 4, 5, seed=1).exp()
    sums: dict[str, list[Tensor]] = {"down": [], "right": []}
    for b, y, x in itertools.product(range(2), range(4), range(5)):
        for name, (v, u) in {"down": (y + 1, x), "right": (y, x + 1)}.items():
            if v < 4 and u < 5:
                e = (maps[b, :, y, x] - maps[b, :, v, u]).abs()
                e = torch.where(e < 1, e**2 / 2, e - 0.5).mean()
                sums[name].append(e * (weights[b, 0, y, x] * weights[b, 0, v, u]) ** 0.5)
    expected = sum(torch.stack(terms).mean() for terms in sums.values()) / 2
    torch.testing.assert_close(total_variation(maps, weights), expected)
    ones = torch.ones_like(weights)
    torch.testing.assert_close(total_variation(maps), total_variation(maps, ones))


def test_the_crf_is_its_kernel_times_distance_over_all_pairs_of_a_small_map() -> None:
    maps, weights = random(1, 3, 3, 4), random(1, 1, 3, 4, seed=1).exp()
    images = torch.rand(1, 3, 6, 8, generator=seeded(), dtype=torch.float64)
    cells = list(itertools.product(range(3), range(4)))
    total = 0.0
    for (y, x), (v, u) in itertools.product(cells, cells):
        one, two = (
            images[0, :, 2 * j : 2 * j + 2, 2 * i : 2 * i + 2].mean((1, 2))
            for j, i in ((y, x), (v, u))
        )
        place = ((y - v) / 3) ** 2 + ((x - u) / 4) ** 2
        kernel = math.exp(-place / 0.2 - float((one - two).square().sum()) / 0.3)
        weight = (weights[0, 0, y, x] * weights[0, 0, v, u]) ** 0.5
        total = total + kernel * weight * (maps[0, :, y, x] - maps[0, :, v, u]).square().mean()
    crf = sampled_crf(maps, images, seeded(), weights)
    torch.testing.assert_close(crf, total / len(cells) ** 2)


def test_the_crf_samples_cells_of_a_large_map_and_projects_many_channels() -> None:
    maps, images = random(2, 160, 40, 40), torch.rand(2, 3, 40, 40, generator=seeded())
    samples = torch.stack([sampled_crf(maps, images, seeded(i)) for i in range(2)])
    assert not torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], sampled_crf(maps, images, seeded(0)))
    # Independent channels of variance one: a squared distance of 2 a channel, before and after.
    kernel_mean = sampled_crf(maps, images, seeded(0)) / 2
    assert 0.05 < kernel_mean < 1
    few = sampled_crf(maps[:, :100], images, seeded(0))  # no projection
    torch.testing.assert_close(few, samples[0], rtol=0.02, atol=0)


def test_the_crf_of_a_constant_map_is_zero() -> None:
    images = torch.rand(1, 3, 8, 8, generator=seeded())
    assert sampled_crf(torch.ones(1, 3, 4, 4), images, seeded()) == 0


def direct_mmd(low: Tensor, high: Tensor) -> Tensor:
    """Nearest cell of each block, then the three means of the unbiased estimate."""
    batch, dim, h, w = low.shape
    fh, fw = high.shape[2] // h, high.shape[3] // w
    xs, ys = [], []
    for b, j, i in itertools.product(range(batch), range(h), range(w)):
        block = high[b, :, j * fh : (j + 1) * fh, i * fw : (i + 1) * fw].reshape(dim, -1).T
        distances = (block - low[b, :, j, i]).square().sum(1)
        xs.append(low[b, :, j, i])
        ys.append(block[distances.argmin()])
    n, rows = len(xs), torch.stack(xs + ys)
    squares = (rows[:, None] - rows).square().sum(-1)
    pairs = [(a, b) for a in range(2 * n) for b in range(2 * n) if a != b]
    median = torch.stack([squares[a, n + b] for a in range(n) for b in range(n)]).median()
    kernel = torch.exp(-squares / median)
    same = sum(kernel[a, b] for a, b in pairs if (a < n) == (b < n)) / (n * (n - 1))
    return same - 2 * kernel[:n, n:].mean()


def test_the_mmd_pairs_each_cell_with_the_nearest_inside_it_and_is_unbiased() -> None:
    low, high = random(2, 3, 2, 3), random(2, 3, 4, 9, seed=1)
    torch.testing.assert_close(maximum_mean_discrepancy(low, high, seeded()), direct_mmd(low, high))


def test_the_mmd_is_about_zero_for_equal_distributions_and_not_for_shifted_ones() -> None:
    low, high = random(2, 4, 12, 12), random(2, 4, 12, 12, seed=1)
    same = maximum_mean_discrepancy(low, high, seeded())
    assert abs(same) < 0.01
    assert maximum_mean_discrepancy(low, high + 1, seeded()) > 10 * abs(same)


def test_the_mmd_compares_a_sample_where_there_are_many_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, high = random(1, 2, 4, 4), random(1, 2, 8, 8, seed=1)
    whole = maximum_mean_discrepancy(low, high, seeded())
    torch.testing.assert_close(maximum_mean_discrepancy(low, high, seeded(1)), whole)
    monkeypatch.setattr(regularisers, "_MMD_CELLS", 5)
    sampled = [maximum_mean_discrepancy(low, high, seeded(i)) for i in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] != whole


def test_the_gradients_of_total_variation_and_crf_are_exact() -> None:
    high = random(1, 2, 4, 4, seed=1).requires_grad_()
    images = torch.rand(1, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    assert torch.autograd.gradcheck(total_variation, high)
    assert torch.autograd.gradcheck(lambda h: sampled_crf(h, images, seeded()), high)


def test_the_mmd_moves_the_nearest_cell_of_each_block_and_no_other() -> None:
    low, high = random(1, 2, 2, 2), random(1, 2, 4, 4, seed=1).requires_grad_()
    grad = torch.autograd.grad(maximum_mean_discrepancy(low, high, seeded()), high)[0]
    blocks = high.detach().unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (1, 2, h, w, 4)
    nearest = (blocks - low[..., None]).square().sum(1).argmin(-1)
    moved = (grad.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4) != 0).any(1)
    assert torch.equal(moved, torch.nn.functional.one_hot(nearest, 4).bool())
