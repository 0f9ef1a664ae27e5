"""The objective: weights, shares, teachers without targets, balancing, dropping."""

import pytest
import torch
from torch import Tensor

from distill.objective.losses import cosine_summary_loss, mse_spatial_loss
from distill.objective.objective import Objective
from distill.objective.objective_config import ObjectiveConfig, TeacherWeights
from distill.objective.views import Pair
from distill.objective.weighting import BalancingConfig, kept_shares
from distill.runtime import distributed
from teachers.features import Features, FeatureSpec
from tests.ranks import run_on_ranks

SHARES = {"a": 1.0, "b": 1.0, "c": 1.0}


def _features(seed: int, dim: int = 4, summary: bool = True) -> Features:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(3, dim, generator=generator) if summary else None
    return Features(vector, torch.randn(3, dim, 2, 5, generator=generator))


def _heads() -> dict[str, Features]:
    heads = {"a": _features(1), "b": _features(2), "c": _features(3, summary=False)}
    for head in heads.values():
        for tensor in head:
            if tensor is not None:
                tensor.requires_grad_()
    return heads


def test_the_total_is_the_weighted_sum_of_its_parts() -> None:
    weights = {"a": TeacherWeights(summary=2, spatial=0.5), "c": TeacherWeights(spatial=3)}
    heads, targets = _heads(), {name: _features(10 + i) for i, name in enumerate("abc")}
    terms = Objective(ObjectiveConfig(weights=weights), {})(heads, targets, SHARES)
    expected = torch.zeros(())
    for name, (summary, spatial) in {"a": (2, 0.5), "b": (1, 1), "c": (0, 3)}.items():
        head, target = heads[name], targets[name]
        if head.summary is not None and target.summary is not None:
            expected = expected + summary * cosine_summary_loss(head.summary, target.summary)
        expected = expected + spatial * mse_spatial_loss(head.spatial, target.spatial)
    assert torch.equal(terms.total, expected)
    assert list(terms.losses) == ["a/summary", "a/spatial", "b/summary", "b/spatial", "c/spatial"]


def test_a_silent_teachers_head_stays_in_the_graph_with_zero_gradient() -> None:
    heads = _heads()
    weights = {"b": TeacherWeights(summary=0, spatial=0)}
    terms = Objective(ObjectiveConfig(weights=weights), {})(heads, {"a": _features(5)}, SHARES)
    terms.total.backward()
    for name in ("b", "c"):
        for tensor in heads[name]:
            if tensor is not None:
                assert tensor.grad is not None
                assert not tensor.grad.any()
    assert heads["a"].spatial.grad is not None
    assert heads["a"].spatial.grad.any()


def test_views_decide_which_cells_are_compared() -> None:
    heads, targets = _heads(), {"a": _features(5)}

    def align(reader: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        assert reader == "a"
        return [
            Pair(prediction[:1, :, :1], target[:1, :, 1:]),
            Pair(prediction[1:2, :, :, :3], target[1:2, :, :, :3]),
            Pair(prediction[2:, :, :0], target[2:, :, :0]),  # this image's views share nothing
        ]

    terms = Objective(ObjectiveConfig(), {})(heads, targets, SHARES, align)
    x, y = heads["a"].spatial, targets["a"].spatial
    one = (x[0, :, 0] - y[0, :, 1]).square().mean()
    two = (x[1, :, :, :3] - y[1, :, :, :3]).square().mean()
    torch.testing.assert_close(terms.losses["a/spatial"], ((one + two) / 3).detach())
    terms.total.backward()
    assert x.grad is not None
    touched = x.grad.abs().amax(1) > 0
    assert touched.flatten(1).sum(1).tolist() == [5, 6, 0]
    assert touched[0, 0].all()


def test_dropping_weighs_each_image_of_each_teacher() -> None:
    config = ObjectiveConfig(dropping=0.6, weights={"b": TeacherWeights(spatial=2)})
    heads, targets = _heads(), {name: _features(10 + i) for i, name in enumerate("abc")}
    torch.manual_seed(3)
    terms = Objective(config, {})(heads, targets, SHARES)
    images: dict[str, Tensor] = {}
    for name, head in heads.items():
        target, spatial = targets[name], 2 if name == "b" else 1
        images[name] = spatial * (head.spatial - target.spatial).square().mean((1, 2, 3))
        if head.summary is not None and target.summary is not None:
            images[name] = images[name] + 1 - torch.cosine_similarity(head.summary, target.summary)
    generator = distributed.derived_generator("dropping")
    shares = kept_shares([loss.detach() for loss in images.values()], 0.6, generator)
    assert min(float(share.min()) for share in shares) == 0
    expected = sum((s * x).mean() for s, x in zip(shares, images.values(), strict=True))
    torch.testing.assert_close(terms.total, expected)
    whole = Objective(ObjectiveConfig(weights=config.weights), {})(heads, targets, SHARES)
    for name, value in whole.losses.items():  # what is logged does not depend on it
        torch.testing.assert_close(terms.losses[name], value)
    terms.total.backward()
    for head, share in zip(heads.values(), shares, strict=True):
        assert head.spatial.grad is not None
        silent = ~head.spatial.grad.flatten(1).any(1)
        assert silent.tolist() == (share == 0).tolist()


def test_balanced_losses_count_alike_and_are_logged_as_they_are() -> None:
    heads, targets = _heads(), {"a": _features(5), "b": _features(6)}
    targets["b"] = targets["b"]._replace(spatial=100 * targets["b"].spatial)
    weights = {"a": TeacherWeights(summary=0, spatial=3), "b": TeacherWeights(summary=0)}
    objective = Objective(
        ObjectiveConfig(weights=weights, balancing=BalancingConfig(decay=0.5)), {}
    )
    plain = objective(heads, targets, SHARES)
    assert plain.total.item() == pytest.approx(
        3 * float(plain.losses["a/spatial"]) + float(plain.losses["b/spatial"])
    )
    objective.finish_step()
    terms = objective(heads, targets, SHARES)
    assert terms.total.item() == pytest.approx(3 + 1)
    assert terms.losses["b/spatial"] > 1000 * terms.losses["a/spatial"]
    terms.total.backward()
    grad = heads["b"].spatial.grad
    assert grad is not None
    due = 2 * (heads["b"].spatial - targets["b"].spatial) / targets["b"].spatial.numel()
    torch.testing.assert_close(grad, due.detach() / terms.losses["b/spatial"])
    objective.finish_step()
    other = Objective(objective.config, {})
    other.restore(objective.state())
    assert torch.equal(other(heads, targets, SHARES).total, objective(heads, targets, SHARES).total)


def _faulty() -> tuple[dict[str, Features], dict[str, Features]]:
    targets = {"a": _features(5), "b": _features(6)}
    targets["b"] = targets["b"]._replace(spatial=targets["b"].spatial * float("nan"))
    return _heads(), targets


def test_a_tolerated_loss_has_no_gradient_and_keeps_its_head_in_the_graph() -> None:
    objective = Objective(ObjectiveConfig(tolerated_non_finite=2), {})
    heads, targets = _faulty()
    terms = objective(heads, targets, SHARES)
    terms.total.backward()
    for head in heads.values():
        assert head.spatial.grad is not None
        assert head.spatial.grad.isfinite().all()
    assert not heads["b"].spatial.grad.any()  # type: ignore[union-attr]
    assert heads["b"].summary.grad.any()  # type: ignore[union-attr]
    bad = {name for name, value in terms.metrics.items() if value}
    assert bad == {"non_finite/b/spatial"}
    assert len(terms.metrics) == 5
    assert terms.losses["b/spatial"] == 0


def test_one_loss_more_than_tolerated_comes_through() -> None:
    objective = Objective(ObjectiveConfig(tolerated_non_finite=2), {})
    for _ in range(2):
        assert objective(*_faulty(), SHARES).total.isfinite()
    terms = objective(*_faulty(), SHARES)
    assert terms.total.isnan()
    assert terms.losses["b/spatial"].isnan()
    assert objective.state()["num_non_finite"] == 2
    fresh = Objective(objective.config, {})
    fresh.restore(objective.state())
    assert fresh(*_faulty(), SHARES).total.isnan()


def test_a_student_that_is_not_finite_is_never_tolerated() -> None:
    heads, targets = _faulty()
    heads["b"] = heads["b"]._replace(spatial=heads["b"].spatial * float("inf"))
    assert Objective(ObjectiveConfig(tolerated_non_finite=2), {})(
        heads, targets, SHARES
    ).total.isnan()


def tolerate_on_ranks() -> list[bool]:
    """Rank 1's teacher fails; both count it."""
    objective, finite = Objective(ObjectiveConfig(tolerated_non_finite=2), {}), []
    for _ in range(3):
        heads, targets = _faulty()
        if distributed.rank() == 0:
            targets["b"] = _features(6)
        finite.append(bool(objective(heads, targets, SHARES).total.isfinite()))
    assert objective.num_non_finite == 2
    return finite


@pytest.mark.process
def test_all_ranks_count_the_tolerated_losses_of_each() -> None:
    assert run_on_ranks(2, tolerate_on_ranks) == [[True, True, True], [True, True, False]]


def test_a_teacher_with_zero_weights_is_not_run() -> None:
    config = ObjectiveConfig(weights={"a": TeacherWeights(summary=1, spatial=0)})
    with_summary = FeatureSpec(summary_dim=4, spatial_dim=4, patch_size=16, resolution=(32, 32))
    without = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=16, resolution=(32, 32))
    assert config.losses_of("a", with_summary) == ["a/summary"]
    assert config.losses_of("a", without) == []
    assert config.losses_of("b", without) == ["b/spatial"]
