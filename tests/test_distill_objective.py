"""The objective and the targets: weights, silence, standardisation, and statistics over ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill import distributed
from distill.config import validate
from distill.errors import RecipeError
from distill.feature_statistics import StatisticsPass, angular_dispersion
from distill.losses import cosine_summary_loss, mse_spatial_loss
from distill.objective import Objective, ObjectiveConfig, TeacherWeights
from distill.recipe import StudentRecipe
from distill.student_task import build_targets
from distill.targets import Shown, Targets
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
    torch.testing.assert_close(terms.total, expected)
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


def _shown(batches: Sequence[Tensor], ranks: int = 1) -> Iterator[Shown]:
    """One batch a step, of each of `ranks`."""
    for step, images in enumerate(batches):
        yield Shown(images, {"t": "auto"}, {"t": step * len(images) * ranks})


def _images(count: int = 32) -> Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def fit_on_ranks(folder: str) -> tuple[Tensor, Tensor, Tensor, str]:
    """Each rank sees its share of the images, in batches of 4."""
    targets = Targets({"t": PatchMean()}, student_patch=8)
    batches = _images().split(4)[distributed.rank() :: distributed.world_size()]
    outcome = targets.fit(_shown(batches, distributed.world_size()), Path(folder), {"data": 1}, 32)
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
        assert targets.fit(_shown(_images().split(4)), tmp_path, facts, 32) == {"t": expected}
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
    targets.fit(_shown(_images().split(4)), tmp_path, {}, 8)
    assert seen == [(18, 26)] * 2
    assert Targets({"t": teacher}, student_patch=8).features(_images(1))["t"].spatial.shape[2:] == (
        *(2, 3),
    )


def test_other_data_are_estimated_anew(tmp_path: Path) -> None:
    for facts in ({"data": 1}, {"data": 2}):
        targets = Targets({"t": PatchMean()}, student_patch=8)
        assert targets.fit(_shown(_images().split(4)), tmp_path, facts, 32) == {"t": "estimated"}


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
