"""The multi-view loss: closed forms, what may not change it, and one backward for all views."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.upsamplers import consistency
from teachers.upsamplers.consistency import (
    Consistency,
    ConsistencyConfig,
    ConsistencyTerms,
    Uncertainty,
    seam_weights,
)
from teachers.upsamplers.downsampler import AttentionDownsampler, BoxDownsampler, Downsampler
from teachers.upsamplers.views import ViewsConfig, sample_homographies, valid_mask, warp

FACTOR, GRID, DIM = (2, 3), (4, 6), 3
SIZE = (FACTOR[0] * GRID[0], FACTOR[1] * GRID[1])
PLAIN = ConsistencyConfig(uncertainty=False, seam_weight=1)
WIDE = ViewsConfig(num_views=3, perspective=(0.05, 0.1), rotation_degrees=15)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def views(config: ViewsConfig = WIDE, batch: int = 2) -> Tensor:
    return sample_homographies(config, batch, SIZE, seeded())


def still(batch: int, num_views: int) -> Tensor:
    return torch.eye(3, dtype=torch.float64).expand(batch, num_views, 3, 3)


def build(
    config: ConsistencyConfig = PLAIN, downsampler: Downsampler | None = None, dim: int = DIM
) -> Consistency:
    torch.manual_seed(0)
    return Consistency(config, dim, downsampler or BoxDownsampler(FACTOR)).double()


def run(loss: Consistency, high: Tensor, targets: Tensor, homographies: Tensor) -> ConsistencyTerms:
    low = F.adaptive_avg_pool2d(high, targets.shape[-2:])
    images = torch.rand(len(high), 3, 16, 24, generator=seeded())
    return loss(high, targets, homographies, low=low, images=images, generator=seeded())


def attention(dim: int = DIM) -> Downsampler:
    torch.manual_seed(1)
    downsampler = AttentionDownsampler(dim, FACTOR)
    nn.init.normal_(downsampler.logit)
    return downsampler


def certain_to_a_degree(loss: Consistency) -> Consistency:
    """Away from its start, where all weights are one."""
    assert loss.uncertainty is not None
    nn.init.normal_(loss.uncertainty.out.weight)
    return loss


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda e: e**2,
    "l1": lambda e: e.abs(),
    "smooth_l1": lambda e: torch.where(e.abs() < 1, e**2 / 2, e.abs() - 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "l1"])
def test_the_loss_is_its_formula_written_out(distance: str) -> None:
    config = ConsistencyConfig(distance=distance, uncertainty_dim=4, seam_weight=3)
    loss = certain_to_a_degree(build(config, attention()))
    high, targets, homographies = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views()
    assert loss.uncertainty is not None
    u = loss.uncertainty(high)
    seams = torch.ones(SIZE, dtype=torch.float64)
    seams[3:5], seams[:, 5:7], seams[:, 11:13] = 3, 3, 3
    total = u.mean() / 2
    for i in range(3):
        view = loss.downsampler(high, homographies[:, i : i + 1])[:, 0]
        weights = warp(torch.exp(-u) * seams / seams.mean(), homographies[:, i], SIZE)
        mask = valid_mask(homographies[:, i], GRID)
        assert 0 < mask.mean() < 1
        weights = F.avg_pool2d(weights, FACTOR)
        summed = 0.0
        for b in range(2):
            for y in range(GRID[0]):
                for x in range(GRID[1]):
                    d = DISTANCES[distance](view[b, :, y, x] - targets[b, i, :, y, x]).mean()
                    summed = summed + mask[b, 0, y, x] * weights[b, 0, y, x] * d
        total = total + summed / (3 * mask.sum())
    # The seams' weights are float32.
    torch.testing.assert_close(
        run(loss, high, targets, homographies).total, total, rtol=1e-6, atol=0
    )


def learned(loss: Consistency, high: Tensor, targets: Tensor) -> Callable[..., Tensor]:
    """The total as a function of the loss's own parameters, in their order."""
    names = [name for name, _ in loss.named_parameters()]
    options = {"low": high, "images": high, "generator": seeded()}

    def total(high: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        arguments = (high, targets, views(batch=1)[:, :2])
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(loss, values, arguments, options).total

    return total


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
def test_its_gradients_are_exact(distance: str) -> None:
    high, targets = random(1, 2, 4, 6).requires_grad_(), random(1, 2, 2, 2, 2, seed=1)
    config = ConsistencyConfig(distance=distance, uncertainty=False)
    loss = build(config, attention(2), dim=2)
    parameters = [p.detach().requires_grad_() for p in loss.parameters()]
    total = learned(loss, high, targets)
    assert torch.autograd.gradcheck(total, (high, targets.requires_grad_(), *parameters))


def test_the_gradients_of_the_uncertainty_are_exact() -> None:
    # The map is held still: the network sees it detached, which no finite difference does.
    high, targets = random(1, 2, 4, 6), random(1, 2, 2, 2, 2, seed=1)
    loss = certain_to_a_degree(build(ConsistencyConfig(uncertainty_dim=2), dim=2))
    parameters = [p.detach().requires_grad_() for p in loss.parameters()]
    assert torch.autograd.gradcheck(learned(loss, high, targets), (high, targets, *parameters))


def test_all_views_together_give_the_sum_of_the_gradients_of_each() -> None:
    loss = build(PLAIN, attention())
    upsampler = nn.Conv2d(3, 3, 3, padding=1).double()
    image, targets, homographies = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views()
    learned = [*upsampler.parameters(), *loss.parameters()]
    total = run(loss, upsampler(image), targets, homographies).total
    together = torch.autograd.grad(total, learned)
    high = upsampler(image)
    apart = [torch.zeros_like(p) for p in learned]
    for i in range(3):
        each = run(loss, high, targets[:, i : i + 1], homographies[:, i : i + 1]).total / 3
        for sum_, grad in zip(
            apart, torch.autograd.grad(each, learned, retain_graph=True), strict=True
        ):
            sum_ += grad
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_one_backward_pass_goes_through_the_upsampler_for_all_views() -> None:
    upsampler, passes = nn.Conv2d(3, 3, 1).double(), []
    upsampler.register_full_backward_hook(lambda *_: passes.append(1))
    high = upsampler(random(2, 3, *SIZE).requires_grad_())
    run(build(), high, random(2, 3, 3, *GRID, seed=1), views()).total.backward()
    assert len(passes) == 1


def field(x: Tensor, y: Tensor) -> Tensor:
    """Three smooth channels."""
    return torch.stack([(2 * x + y).sin(), (x - 2 * y).cos(), x * y], dim=-3)


def centres(n: int) -> Tensor:
    return (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1


def test_a_smooth_field_agrees_with_its_own_views() -> None:
    size = (32, 48)
    homographies = sample_homographies(ViewsConfig(), 1, size, seeded())
    y, x = torch.meshgrid(centres(size[0]), centres(size[1]), indexing="ij")
    high, targets = field(x, y)[None], []
    for homography in homographies[0]:  # targets from the formula, not from a warp
        a, b, c = (row[0] * x + row[1] * y + row[2] for row in homography)
        targets.append(F.avg_pool2d(field(a / c, b / c), FACTOR))
    stacked = torch.stack(targets)[None]
    terms = run(build(), high, stacked, homographies)
    wrong = run(build(), high, stacked, torch.linalg.inv(homographies))
    assert terms.total < 1e-4
    assert wrong.total > 50 * terms.total
    assert terms.mse < 1e-4


@pytest.mark.parametrize("downsampler", [None, attention()])
def test_constant_features_agree_whatever_the_views(downsampler: Downsampler | None) -> None:
    constant = random(1, 3, 1, 1)
    high = constant.expand(2, 3, *SIZE)
    targets = constant.expand(2, 3, *GRID)[:, None].expand(-1, 3, -1, -1, -1)
    assert run(build(PLAIN, downsampler), high, targets, views()).total < 1e-20


def test_a_constant_added_to_each_channel_of_both_sides_changes_nothing() -> None:
    high, targets, shift = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), random(3, 1, 1)
    loss = build(ConsistencyConfig(uncertainty=False), attention())
    before = run(loss, high, targets, views()).total
    torch.testing.assert_close(run(loss, high + shift, targets + shift, views()).total, before)


def test_cells_from_outside_of_the_base_never_change_the_loss() -> None:
    loss = certain_to_a_degree(build(ConsistencyConfig(uncertainty_dim=4), attention()))
    high, targets, homographies = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views()
    before = run(loss, high, targets, homographies)
    masks = torch.stack([valid_mask(homographies[:, i], GRID) for i in range(3)], 1)
    changed = torch.where(masks == 0, 1e3, targets)
    assert (changed != targets).any()
    after = run(loss, high, changed, homographies)
    assert torch.equal(after.total, before.total)
    assert torch.equal(after.mse, before.mse)
    valid = torch.where(masks == 1, targets + 1, targets)
    assert not torch.equal(run(loss, high, valid, homographies).total, before.total)


def test_a_view_that_shows_little_of_the_base_weighs_little() -> None:
    homographies = still(1, 1).clone()
    homographies[..., 0, 2] = 2 * 5 / 6  # one column of six is left
    high, targets = torch.zeros(1, 3, *SIZE).double(), torch.ones(1, 1, 3, *GRID).double()
    assert run(build(), high, targets, homographies).total == pytest.approx((1 / 6) / (1 / 2))


def unit(*shape: int) -> Tensor:
    """Random numbers whose mean square is one."""
    values = random(*shape, seed=2)
    return values / values.square().mean().sqrt()


def test_fidelity_is_one_for_a_prediction_of_the_mean() -> None:
    targets = unit(2, 3, 3, *GRID)
    terms = run(build(), torch.zeros(2, 3, *SIZE).double(), targets, still(2, 3))
    torch.testing.assert_close(1 / terms.mse, torch.ones(()).double())


def test_fidelity_is_one_over_the_variance_of_noise() -> None:
    high = random(2, 3, *SIZE)
    clean = F.avg_pool2d(high, FACTOR)[:, None].expand(-1, 3, -1, -1, -1)
    terms = run(build(), high, clean + 0.2 * unit(2, 3, 3, *GRID), still(2, 3))
    torch.testing.assert_close(1 / terms.mse, torch.tensor(25.0).double())


def test_fidelity_is_the_features_variance_over_the_error_in_the_teacher_s_own_space() -> None:
    rotation = torch.linalg.qr(random(3, 3))[0]
    alpha, mean = 0.3, random(3, 1, 1, seed=3)
    raw_high, raw_targets = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1)

    def standardised(maps: Tensor) -> Tensor:
        return alpha * torch.einsum("cd,...dhw->...chw", rotation, maps - mean)

    terms = run(build(), standardised(raw_high), standardised(raw_targets), still(2, 3))
    error = F.avg_pool2d(raw_high, FACTOR)[:, None] - raw_targets
    torch.testing.assert_close(1 / terms.mse, (1 / alpha**2) / error.square().mean())


def test_fidelity_knows_no_weights_and_no_other_distance() -> None:
    high, targets, homographies = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views()
    plain = run(build(), high, targets, homographies)
    config = ConsistencyConfig(distance="l1", uncertainty_dim=4, seam_weight=5)
    weighted = run(certain_to_a_degree(build(config)), high, targets, homographies)
    torch.testing.assert_close(weighted.mse, plain.mse)
    torch.testing.assert_close(plain.mse, plain.total)
    assert not torch.allclose(weighted.total, plain.total)


def test_seams_are_two_cells_wide_and_weights_average_to_one() -> None:
    weights = seam_weights((6, 8), (3, 4), 2.0)
    assert weights.mean() == pytest.approx(1)
    plain = weights.min()
    heavy = torch.zeros(6, 8, dtype=torch.bool)
    heavy[2:4], heavy[:, 3:5] = True, True
    torch.testing.assert_close(weights[heavy], (2 * plain).expand(int(heavy.sum())))
    torch.testing.assert_close(weights[~heavy], plain.expand(int((~heavy).sum())))


@pytest.mark.parametrize("tile, weight", [((6, 8), 5.0), ((3, 4), 1.0)])
def test_without_seams_or_without_extra_weight_all_cells_weigh_one(
    tile: tuple[int, int], weight: float
) -> None:
    assert torch.equal(seam_weights((6, 8), tile, weight), torch.ones(6, 8))


def test_uncertainty_starts_with_weight_one_and_no_regulariser() -> None:
    high, targets, homographies = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views()
    with_net = run(
        build(ConsistencyConfig(uncertainty_dim=4, seam_weight=1)), high, targets, homographies
    )
    assert with_net.parts["uncertainty"] == 0
    torch.testing.assert_close(with_net.total, run(build(), high, targets, homographies).total)


def test_the_loss_is_least_where_uncertainty_is_the_log_of_twice_the_error() -> None:
    loss = build(ConsistencyConfig(uncertainty_dim=1, seam_weight=1))
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)

    class Constant(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return constant.expand(len(maps), 1, *maps.shape[2:])

    loss.uncertainty = Constant()  # type: ignore[assignment]
    high, targets = torch.zeros(2, 3, *SIZE).double(), 0.3 * unit(2, 1, 3, *GRID)
    with torch.no_grad():
        constant.fill_(math.log(2 * 0.3**2))
    run(loss, high, targets, still(2, 1)).total.backward()
    assert constant.grad is not None
    assert abs(constant.grad) < 1e-12


def test_uncertainty_is_learned_and_does_not_move_the_map_by_itself() -> None:
    loss = certain_to_a_degree(build(ConsistencyConfig(uncertainty_dim=4)))
    high = random(2, 3, *SIZE).requires_grad_()
    targets = random(2, 3, 3, *GRID, seed=1).requires_grad_()
    run(loss, high, targets, views()).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert targets.grad is not None  # a position bias is learned through the targets too
    assert targets.grad.any()
    agreeing = F.avg_pool2d(high.detach(), FACTOR)[:, None]
    high.grad = None
    run(loss, high, agreeing, still(2, 1)).total.backward()
    assert high.grad is not None
    assert high.grad.abs().max() < 1e-12  # no error: only exp(-u) and u / 2 are left to push


def test_the_uncertainty_net_has_the_paper_s_layers() -> None:
    net = Uncertainty(8, 256)
    assert [tuple(p.shape) for p in net.parameters()] == [(256, 8, 5, 5), (256,), (1, 256, 1, 1)]
    assert net(torch.randn(2, 8, 5, 7)).shape == (2, 1, 5, 7)


@pytest.mark.parametrize("size", [(5, 7), (3, 3), (2, 9), (1, 1)])
def test_the_uncertainty_net_reflects_at_the_border_and_takes_the_smallest_maps(
    size: tuple[int, int],
) -> None:
    net, maps = (
        certain_to_a_degree(build(ConsistencyConfig(uncertainty_dim=4))),
        random(2, 3, *size),
    )
    net = net.uncertainty  # type: ignore[assignment]
    mode = "reflect" if min(size) > 2 else "edge"
    padded = torch.from_numpy(np.pad(maps.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode=mode))
    hidden = F.gelu(F.conv2d(padded, net.hidden.weight, net.hidden.bias))
    torch.testing.assert_close(net(maps), F.conv2d(hidden, net.out.weight))


REGULARISERS = {
    "tv_weight": "total_variation",
    "crf_weight": "sampled_crf",
    "mmd_weight": "maximum_mean_discrepancy",
}


@pytest.mark.parametrize("key, function", REGULARISERS.items())
def test_a_regulariser_is_called_only_where_its_weight_is_above_zero(
    key: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stub(*_: object) -> Tensor:
        calls.append(function)
        return torch.tensor(4.0).double()

    for name in REGULARISERS.values():
        monkeypatch.setattr(consistency, name, stub)
    data = random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views()
    plain = run(build(), *data)
    assert calls == []
    terms = run(build(PLAIN.model_copy(update={key: 0.5})), *data)
    assert calls == [function]
    torch.testing.assert_close(terms.total, plain.total + 2)


def test_the_parts_add_up_to_the_total() -> None:
    weights = {"tv_weight": 0.1, "crf_weight": 0.2, "mmd_weight": 0.3}
    loss = certain_to_a_degree(build(ConsistencyConfig(uncertainty_dim=4, **weights)))
    terms = run(loss, random(2, 3, *SIZE), random(2, 3, 3, *GRID, seed=1), views())
    assert list(terms.parts) == ["reconstruction", "uncertainty", "tv", "crf", "mmd"]
    torch.testing.assert_close(torch.stack(list(terms.parts.values())).sum(), terms.total)
    assert not any(part.requires_grad for part in terms.parts.values())


def test_autocast_leaves_the_loss_in_float32() -> None:
    loss = build(ConsistencyConfig(uncertainty=False), attention()).float()
    high, targets = random(2, 3, *SIZE).float(), random(2, 3, 3, *GRID, seed=1).float()
    plain = run(loss, high, targets, views())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(loss, high, targets, views())
    assert cast.total.dtype == torch.float32
    torch.testing.assert_close(cast.total, plain.total)


def test_bfloat16_maps_are_compared_in_float32() -> None:
    loss = certain_to_a_degree(build(ConsistencyConfig(uncertainty_dim=4), attention())).float()
    high, targets = random(2, 3, *SIZE).bfloat16(), random(2, 3, 3, *GRID, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = run(loss, high, targets, views())
    assert terms.total.dtype == terms.mse.dtype == torch.float32
