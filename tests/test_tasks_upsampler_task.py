"""What train_upsampler trains, in process: every kind, every option, and on two ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.parametrization.reparametrize import plain_weights
from distill.runtime import distributed
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.tasks.upsampler_task import (
    MultiView,
    build_multi_view,
    draw_views,
    parameter_groups,
)
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize
from teachers.upsamplers.upsampler import Encode, UpsampledFeatures
from teachers.upsamplers.views import sample_homographies, warp_images
from tests.doubles import DIM, SPEC, Curved
from tests.ranks import run_on_ranks


def read(kind: str = "featsharp", **sections: Any) -> UpsamplerRecipe:
    factor = sections.pop("factor", [2, 3])
    upsampler = {"kind": kind, "factor": factor, **sections.pop("upsampler", {})}
    if kind == "featsharp":
        upsampler = {"inputs": ["jbu", "tiles"], "num_heads": 4, **upsampler}
    tree = {
        "run": {"dir": "unused", "steps": 200, "batch_size": 4},
        "data": {"sources": [{"shards": "unused"}]},
        "teacher": {"kind": "timm", "model": "unused"},
        "upsampler": upsampler,
        "consistency": {"uncertainty_dim": 8, **sections.pop("consistency", {})},
        "views": {"num_views": 3},
    }
    return UpsamplerRecipe.model_validate(tree | sections)


def fit(teacher: Teacher) -> PhiS:
    statistics = FeatureStatistics.zeros(DIM)
    images = torch.rand(50, 3, 12, 20, generator=torch.Generator().manual_seed(1))
    statistics.update(teacher(images).spatial)
    return fit_phi_s(statistics)


def build(recipe: UpsamplerRecipe) -> tuple[MultiView, Curved]:
    teacher = Curved()
    phi_s = fit(teacher)
    teacher.seen.clear()
    return build_multi_view(recipe, teacher, phi_s).train(), teacher


@torch.no_grad()
def wake(module: MultiView) -> None:
    """Away from the start, where little depends on little."""
    torch.manual_seed(3)
    for name, parameter in module.named_parameters():
        if name.endswith(("_scale", "logit", "out.weight", "bias.map")):
            parameter.normal_(std=0.3)


def batch(recipe: UpsamplerRecipe, module: MultiView, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = module.upsampler.factor
    images = torch.rand(4, 3, 12 * factor[0], 20 * factor[1], generator=generator)
    grid = (3 * factor[0], 5 * factor[1])
    return images, sample_homographies(recipe.views, 4, grid, generator)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("featsharp", {}),
    ("featsharp", {"factor": 1}),
    ("featsharp", {"bias": False}),
    ("featsharp", {"spectral": True}),
    ("featsharp", {"consistency": {"uncertainty": False, "seam_weight": 1}}),
    ("featsharp", {"consistency": {"tv_weight": 0.1, "crf_weight": 0.1, "mmd_weight": 0.1}}),
    ("featsharp", {"upsampler": {"inputs": ["jafar", "tiles"], "norm": False}}),
    ("featsharp", {"upsampler": {"inputs": ["bilinear", "rgb"], "position": "rope"}}),
    ("bilinear", {}),
    ("bilinear", {"bias": False, "consistency": {"uncertainty": False}}),
    ("tile", {}),
    ("s2", {}),
    ("featup", {}),
    ("sapa", {}),
    ("resfu", {}),
    ("jafar", {}),
    ("anyup", {}),
]


@pytest.mark.long
@pytest.mark.parametrize("kind, sections", KINDS, ids=str)
def test_two_steps_of_every_kind_reach_every_parameter(kind: str, sections: dict[str, Any]) -> None:
    recipe = read(kind, **sections)
    module, _ = build(recipe)
    groups = parameter_groups(module, recipe)
    grouped = [p for group in groups for p in group.parameters]
    assert len(grouped) == len({*grouped}) == len(list(module.parameters()))
    optimizer = torch.optim.NAdam([p for p in grouped if p.requires_grad], lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        terms = module(*batch(recipe, module, step))
        terms.total.backward()
        optimizer.step()
        assert terms.total.isfinite()
        torch.testing.assert_close(terms.total.detach(), sum(terms.parts.values()))
        assert terms.mse > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_parameters_learn_at_the_rates_of_their_parts() -> None:
    recipe = read(optimizer={"weight_decay": 0.3}, spectral=True)
    module, _ = build(recipe)
    names = {p: n for n, p in module.named_parameters()}
    groups = {g.name: g for g in parameter_groups(module, recipe)}
    found = {name: {names[p] for p in g.parameters} for name, g in groups.items()}
    assert {g.name: (g.lr_scale, g.weight_decay) for g in groups.values()} == {
        "main": (1.0, 0.0),
        "guidance": (0.2, 0.0),
        "spectral": (0.1, 0.3),
        "uncertainty": (0.02, 0.0),
    }
    assert found["guidance"] == {n for n in names.values() if ".jbu." in n}
    linears = ("q", "k", "v", "proj", "gate", "value", "down")
    assert found["spectral"] == {
        f"upsampler.inner.fusion.{n}.parametrizations.weight.0.scale" for n in linears
    }
    assert found["uncertainty"] == {n for n in names.values() if ".uncertainty." in n}
    alone = {g.name for g in parameter_groups(build(read("featup"))[0], read("featup"))}
    assert alone == {"main", "uncertainty"}


def test_a_parameter_that_is_called_scale_is_no_spectral_one() -> None:
    recipe = read("bilinear")
    module, _ = build(recipe)
    module.upsampler.inner.scale = nn.Parameter(torch.ones(1))  # as a user's own may be
    groups = {g.name: g.parameters for g in parameter_groups(module, recipe)}
    assert any(p is module.upsampler.inner.scale for p in groups["main"])
    assert "spectral" not in groups


@pytest.mark.parametrize(
    "kind, factor, weight",
    [("featsharp", 2, 2.0), ("tile", 2, 2.0), ("s2", 2, 2.0)]
    + [(kind, 2, 1.0) for kind in ("bilinear", "featup", "sapa", "resfu", "jafar", "anyup")]
    + [("featsharp", 1, 1.0)],
)
def test_seams_are_weighed_where_tiles_meet_and_nowhere_else(
    kind: str, factor: int, weight: float
) -> None:
    module, _ = build(read(kind, factor=factor))
    assert module.consistency.config.seam_weight == weight


def test_the_encoder_is_no_part_of_the_module_and_runs_once_a_batch() -> None:
    recipe = read()
    module, teacher = build(recipe)
    module(*batch(recipe, module))
    assert teacher.batches == [4 * (1 + 2 * 3 + 3)]  # whole, tiles, views
    assert not any("net" in name or "teacher" in name for name in module.state_dict())


@torch.no_grad()
def test_targets_are_the_encoders_maps_of_the_views_in_the_space_of_the_upsampler() -> None:
    recipe = read()
    module, teacher = build(recipe)
    assert module.upsampler.bias is not None
    nn.init.normal_(module.upsampler.bias.map)
    images, homographies = batch(recipe, module)
    features, targets = module.upsample(images, homographies)
    views = warp_images(images, homographies, (12, 20))
    due = module.upsampler.phi_s(teacher(views).spatial) + module.upsampler.bias.map
    torch.testing.assert_close(targets, due.unflatten(0, (4, 3)))
    own = module.upsampler.standardised(images, teacher)
    torch.testing.assert_close(features.high.spatial, own.high.spatial)
    torch.testing.assert_close(features.low.summary, teacher(resize(images, (12, 20))).summary)


@torch.no_grad()
def test_close_ups_are_encoded_from_pixels_as_fine_as_those_of_tiles() -> None:
    recipe = read(factor=2, views={"num_views": 3, "close_ups": 2})
    module, teacher = build(recipe)
    torch.manual_seed(0)
    homographies = draw_views(recipe.views, 4, teacher.spec, (2, 2))
    assert (homographies[:, 2].det() < 0.7).all()
    images = batch(recipe, module)[0]
    targets = module.upsample(images, homographies)[1]
    for i, magnification in enumerate((1.0, 2**0.25, 2**0.75)):
        views = warp_images(images, homographies[:, i : i + 1], (12, 20), (magnification,))
        due = module.upsampler.standardise(teacher(views).spatial)
        torch.testing.assert_close(targets[:, i], due)


def test_the_gradient_of_all_views_at_once_is_the_sum_of_theirs() -> None:
    recipe = read()  # without power iteration, which moves on with each forward pass
    module, _ = build(recipe)
    wake(module)
    images, homographies = batch(recipe, module)
    module(images, homographies).total.backward()
    together = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    for i in range(3):
        (module(images, homographies[:, i : i + 1]).total / 3).backward()
    assert len(together) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        off = (parameter.grad - together[name]).norm()
        assert off < 2e-6 * together[name].norm() + 1e-7, name


@torch.no_grad()
def test_an_upsampler_may_call_its_encoder_more_than_once() -> None:
    """Though none here does: a user's own may encode level by level."""
    recipe = read("bilinear")
    module, teacher = build(recipe)
    images, homographies = batch(recipe, module)
    due, targets = module.upsample(images, homographies)
    inner = module.upsampler.inner

    class Twice(type(inner)):  # type: ignore[misc]
        def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
            encode(resize(images, (12, 20)))
            return super().forward(images, encode)

    module.upsampler.inner = Twice(SPEC, inner.factor)
    teacher.seen.clear()
    again, same = module.upsample(images, homographies)
    assert teacher.batches == [4 * (1 + 3), 4]
    assert torch.equal(again.high.spatial, due.high.spatial)
    assert torch.equal(same, targets)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = build(read())[0].state_dict()
    torch.manual_seed(6)
    other = build(read())[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    reseeded = read(run={"dir": "unused", "steps": 200, "batch_size": 4, "seed": 1})
    changed = build(reseeded)[0].state_dict()
    assert any(not torch.equal(one[name], changed[name]) for name in one)


def train(stage: int, global_batch: int) -> dict[str, Tensor]:
    """Three optimiser steps under the engine, on this rank's share of each batch.

    In one micro-batch: power iteration moves on with each, and so would depend on which images
    come first.
    """
    # A large eps: Adam would make a full step of the rounding of a gradient that is zero.
    engine = {"zero_stage": stage, "gradient_clipping": 0.5}
    recipe = read(engine=engine, optimizer={"eps": 1e-3}, spectral=True)
    module, _ = build(recipe)
    wake(module)
    share = global_batch // distributed.world_size()
    part = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    groups = parameter_groups(module, recipe)
    engine = DeepSpeedEngine(
        module, recipe.engine, recipe.optimizer, groups, micro_batch_size=share
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(global_batch, 3, 24, 60, generator=generator)
        views = torch.eye(3, dtype=torch.float64).repeat(global_batch, 3, 1, 1)
        # Inside of their image, so that each has the same number of valid cells.
        zoom = 0.7 + 0.2 * torch.rand(global_batch, 3, dtype=torch.float64, generator=generator)
        views[..., 0, 0] = views[..., 1, 1] = zoom
        views[..., :2, 2] = 0.1 * (2 * torch.rand(global_batch, 3, 2, generator=generator) - 1)
        engine.backward(engine(images[part], views[part]).total)
        engine.step(1e-2)
    # As the rank itself holds them, and as they are gathered.
    own = {f"own.{n}": t.detach().clone() for n, t in module.state_dict().items()}
    weights = engine.weights()
    engine.close()
    return weights | (own if stage < 3 else {})


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_hold_equal_replicas_and_what_one_rank_would(stage: int) -> None:
    one, other = run_on_ranks(2, train, stage, 8)
    (alone,) = run_on_ranks(1, train, stage, 8)
    module, _ = build(read(spectral=True))
    wake(module)
    assert any("parametrizations" in name for name in alone)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-5, msg=name)
    still = [name for name, p in module.named_parameters() if torch.equal(p, one[name])]
    assert not still
    assert not any("parametrizations" in name for name in plain_weights(alone))


def public_schedule() -> list[Tensor]:
    """One forward pass under DDP, then a backward pass for each view; the gradients after each."""
    module, teacher = build(read("featup"))
    images, _ = batch(read("featup"), module, seed=distributed.rank())
    replica = nn.parallel.DistributedDataParallel(module.upsampler.inner)
    high = replica(images, teacher).high
    after = []
    for view in range(2):
        torch.manual_seed(view)
        (high.spatial * torch.randn(high.spatial.shape)).mean().backward(retain_graph=view == 0)
        gradients = [p.grad for p in module.upsampler.inner.parameters() if p.grad is not None]
        after.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return after


@pytest.mark.process
def test_replicas_of_the_public_schedule_drift_from_the_second_view_on() -> None:
    one, other = run_on_ranks(2, public_schedule)
    assert torch.equal(one[0], other[0])
    assert (one[1] - other[1]).norm() > 0.1 * one[1].norm()
