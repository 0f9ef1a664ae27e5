"""The objective and the targets: weights, silence, standardisation, and statistics over ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.objective.losses import cosine_summary_loss, mse_spatial_loss
from distill.objective.objective import Objective, ObjectiveConfig, TeacherWeights
from distill.objective.views import Pair
from distill.objective.weighting import BalancingConfig, kept_shares
from distill.runtime import distributed
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.targets.target_statistics import StatisticsPass, angular_dispersion
from distill.targets.targets import CalibrationBatch, Targets
from distill.tasks.build import build_targets
from distill.tasks.student_recipe import StudentRecipe
from teachers.build import build_teacher
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
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
    assert list(terms.parts) == ["a/summary", "a/spatial", "b/summary", "b/spatial", "c/spatial"]


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
    torch.testing.assert_close(terms.parts["a/spatial"], ((one + two) / 3).detach())
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
    for name, value in whole.parts.items():  # what is logged does not depend on it
        torch.testing.assert_close(terms.parts[name], value)
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
        3 * float(plain.parts["a/spatial"]) + float(plain.parts["b/spatial"])
    )
    objective.finish_step()
    terms = objective(heads, targets, SHARES)
    assert terms.total.item() == pytest.approx(3 + 1)
    assert terms.parts["b/spatial"] > 1000 * terms.parts["a/spatial"]
    terms.total.backward()
    grad = heads["b"].spatial.grad
    assert grad is not None
    due = 2 * (heads["b"].spatial - targets["b"].spatial) / targets["b"].spatial.numel()
    torch.testing.assert_close(grad, due.detach() / terms.parts["b/spatial"])
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
    assert terms.parts["b/spatial"] == 0


def test_one_loss_more_than_tolerated_comes_through() -> None:
    objective = Objective(ObjectiveConfig(tolerated_non_finite=2), {})
    for _ in range(2):
        assert objective(*_faulty(), SHARES).total.isfinite()
    terms = objective(*_faulty(), SHARES)
    assert terms.total.isnan()
    assert terms.parts["b/spatial"].isnan()
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


def test_all_ranks_count_the_tolerated_losses_of_each() -> None:
    assert run_on_ranks(2, tolerate_on_ranks) == [[True, True, True], [True, True, False]]


def test_a_teacher_with_zero_weights_is_not_run() -> None:
    config = ObjectiveConfig(weights={"a": TeacherWeights(summary=1, spatial=0)})
    with_summary = FeatureSpec(summary_dim=4, spatial_dim=4, patch_size=16, resolution=(32, 32))
    without = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=16, resolution=(32, 32))
    assert config.runs("a", with_summary)
    assert not config.runs("a", without)
    assert config.runs("b", without)


class PatchMean(Teacher):
    """Mean colour of 8 px patches, times a mixing matrix; the summary is the image's."""

    def __init__(self) -> None:
        spec = FeatureSpec(
            summary_dim=3, spatial_dim=3, patch_size=8, resolution=(16, 16), any_resolution=True
        )
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
        self.register_buffer("mixing", mixing)

    def extract(self, images: Tensor) -> Features:
        maps = torch.nn.functional.avg_pool2d(images, 8)
        maps = torch.einsum("dc,bchw->bdhw", self.mixing, maps)
        return Features(maps.mean((2, 3)), maps)


def _calibration_batches(batches: Sequence[Tensor], ranks: int = 1) -> Iterator[CalibrationBatch]:
    """One batch a step, of each of `ranks`."""
    for step, images in enumerate(batches):
        yield CalibrationBatch(images, {"t": "auto"}, {"t": step * len(images) * ranks})


def _images(count: int = 32) -> Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def fit_on_ranks(folder: str) -> tuple[Tensor, Tensor, Tensor, str]:
    """Each rank sees its share of the images, in batches of 4."""
    targets = Targets({"t": PatchMean()}, student_patch=8)
    batches = _images().split(4)[distributed.rank() :: distributed.world_size()]
    outcome = targets.fit(
        _calibration_batches(batches, distributed.world_size()), Path(folder), {"data": 1}, 32
    )
    statistics = targets.statistics["t"]
    phi_s = statistics.phi_s
    return phi_s.alpha * phi_s.rotation, phi_s.mean, statistics.dispersion, outcome["t"]


def test_statistics_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    alone = run_on_ranks(1, fit_on_ranks, str(tmp_path / "1"))[0]
    for shared in run_on_ranks(2, fit_on_ranks, str(tmp_path / "2")):
        for one, two in zip(alone[:3], shared[:3], strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        assert shared[3] == "estimated"


def test_standardised_targets_have_mean_0_and_variance_1_and_are_estimated_once(
    tmp_path: Path,
) -> None:
    for expected in ("estimated", "cached"):
        targets = Targets({"t": PatchMean()}, student_patch=8)
        facts = {"data": 1}
        assert targets.fit(_calibration_batches(_images().split(4)), tmp_path, facts, 32) == {
            "t": expected
        }
        maps = targets(_images())["t"].spatial.double().movedim(1, 0).flatten(1)
        assert maps.mean(1).abs().max() < 1e-5
        torch.testing.assert_close(
            maps.var(1), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0
        )


def test_without_a_student_a_teacher_sees_its_native_resolution(tmp_path: Path) -> None:
    """Also where that is no multiple of its patch, though it takes any that is."""
    teacher = PatchMean()
    teacher.spec = replace(teacher.spec, resolution=(18, 26), any_resolution=True)
    seen: list[tuple[int, ...]] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    targets = Targets({"t": teacher}, student_patch=None)
    targets.fit(_calibration_batches(_images().split(4)), tmp_path, {}, 8)
    assert seen == [(18, 26)] * 2
    assert Targets({"t": teacher}, student_patch=8).features(_images(1))["t"].spatial.shape[2:] == (
        *(2, 3),
    )


def test_other_data_are_estimated_anew(tmp_path: Path) -> None:
    for facts in ({"data": 1}, {"data": 2}):
        targets = Targets({"t": PatchMean()}, student_patch=8)
        assert targets.fit(_calibration_batches(_images().split(4)), tmp_path, facts, 32) == {
            "t": "estimated"
        }


def test_a_checkpoints_statistics_win_over_what_was_estimated_since(tmp_path: Path) -> None:
    first, second = (Targets({"t": PatchMean()}, student_patch=8) for _ in range(2))
    first.fit(_calibration_batches(_images().split(4)), tmp_path / "one", {}, 32)
    first.save(tmp_path / "checkpoint")
    second.fit(_calibration_batches((_images() ** 3).split(4)), tmp_path / "two", {}, 32)
    due, other = first.dispersions()["t"], second.dispersions()["t"]
    assert due > 0
    assert due != other
    second.load(tmp_path / "checkpoint")
    assert torch.equal(second.dispersions()["t"], due)
    images = _images(3)
    assert torch.equal(second(images)["t"].spatial, first(images)["t"].spatial)


def test_a_checkpoint_without_a_teachers_statistics_is_refused(tmp_path: Path) -> None:
    targets = Targets({"t": PatchMean()}, student_patch=8)
    targets.fit(_calibration_batches(_images().split(4)), tmp_path / "one", {}, 32)
    with pytest.raises(ValueError, match=r"t\.safetensors: missing, or not the statistics"):
        targets.load(tmp_path / "nothing")


def test_dispersion_is_the_mean_squared_angle_to_the_mean_direction() -> None:
    half_turn = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert angular_dispersion(half_turn) == pytest.approx((torch.pi / 4) ** 2)


def test_a_teacher_without_summary_has_dispersion_one() -> None:
    spec = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=8, resolution=(16, 16))
    statistics = StatisticsPass(spec)
    statistics.update(_features(0, summary=False))
    assert statistics.finish().dispersion == 1


@pytest.mark.parametrize(
    "run, evaluation, refused",
    [(256, [256], None), (512, [256], "512 x 512"), (256, [[256, 384]], "256 x 384")],
)
def test_a_student_beyond_the_reach_of_upsamplers_is_refused_before_any_image(
    run: int, evaluation: list[object], refused: str | None
) -> None:
    tree = {
        "run": {"dir": "unused", "steps": 1, "batch_size": 1, "resolution": run},
        "data": {"sources": [{"shards": "unused"}]},
        "teachers": {"clip": {"kind": "dfn_clip", "model": "clip_ti16_128", "weights": "none"}},
        "student": {"size": "tiny"},
        "evaluation": {"images": "unused", "resolutions": evaluation},
    }
    tree["teachers"]["clip"]["upsampler"] = [{"kind": "tile", "factor": f} for f in (1, 2)]  # type: ignore[index]
    recipe = validate(StudentRecipe, tree, "recipe")
    teachers = {n: build_teacher(c, device="meta") for n, c in recipe.teachers.items()}
    if refused is None:
        assert list(build_targets(recipe, teachers).teachers) == ["clip"]
        return
    message = rf"teachers.clip: students of {refused} px have a grid of .*add one of"
    with pytest.raises(RecipeError, match=message):
        build_targets(recipe, teachers)
