"""Arms on ranks of their own, on all ranks in turn, and in one process: one gradient, one estimate.

The reference is plain PyTorch without an engine: a teacher's loss is the mean over the images that
it sees in the step, written out for each arm.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.optimizer import decay_groups
from distill.runtime import distributed
from distill.runtime.config import validate
from distill.targets.ensemble import Ensemble
from distill.targets.source import LiveTargets
from distill.targets.target_statistics import CalibrationBatch, Statistics
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.student_task import StudentTask
from distill.training.arms import MicroBatch, StepPlan
from student.model import Student
from teachers.features import FeatureSpec
from tests.doubles import Patches
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.process

SIZES = {"low": (32, 48), "high": (64, 64)}
BATCHES = {"low": 8, "high": 4}
SEEN_BY = {"low": ("one", "other"), "high": ("one",)}
HUGE = 1e6
WEIGHTS = {"low": 1.0, "high": 3.0}
SPECS = {
    "one": FeatureSpec(
        summary_dim=3, spatial_dim=5, patch_size=8, resolution=(32, 48), any_resolution=True
    ),
    "other": FeatureSpec(summary_dim=3, spatial_dim=4, patch_size=16, resolution=(32, 48)),
}


def recipe(stage: int, own_ranks: bool) -> StudentRecipe:
    arms = {
        name: {
            "resolution": list(SIZES[name]),
            "batch_size": BATCHES[name],
            "micro_batch_size": BATCHES[name] // 4,
            "teachers": list(SEEN_BY[name]),
            "weight": WEIGHTS[name],
            "ranks": 1 if own_ranks else None,
        }
        for name in SIZES
    }
    tree = {
        "run": {"dir": "unused", "steps": 100},
        "data": {"sources": [{"shards": "unused"}]},
        "teachers": {name: {"kind": "timm", "model": "test_vit"} for name in SPECS},
        "arms": arms,
        "student": {
            **{"width": 16, "depth": 1, "heads": 2, "max_resolution": 64},
            "head": {"hidden_dim": 8, "num_layers": 1},
        },
        "objective": {"standardisation": "none", "weights": {"one": {"spatial": 2.0}}},
        "optimizer": {"eps": HUGE, "weight_decay": 0},
        "engine": {"zero_stage": stage, "gradient_clipping": 0},
    }
    return validate(StudentRecipe, tree, "recipe")


def images(micro_batch: MicroBatch) -> Tensor:
    """Each image by its place in the step."""
    generators = [
        torch.Generator().manual_seed(micro_batch.first + i) for i in range(micro_batch.images)
    ]
    return torch.stack([torch.rand(3, *SIZES[micro_batch.arm], generator=g) for g in generators])


def student_of(made: StudentRecipe) -> Student:
    distributed.seed_default_generators(0, "student")
    return Student(made.student, SPECS)


class Step(NamedTuple):
    """What one step shows on one rank.

    Attributes:
        gradients: parameter to gradient, over all ranks.
        losses: name to loss, over all ranks.
        names: of the losses that this rank has.
        encoded: teacher to the images that this rank ran it on.
    """

    gradients: dict[str, Tensor]
    losses: dict[str, float]
    names: list[str]
    encoded: dict[str, int]


def gradient(stage: int, own_ranks: bool) -> Step:
    made, world = recipe(stage, own_ranks), distributed.world_size()
    plan, student = made.step_plan(world), student_of(made)
    mine = plan.teachers_of(distributed.rank())
    teachers = {name: Patches(SPECS[name]).freeze() for name in SPECS if name in mine}
    groups = decay_groups(student, made.optimizer, set())
    engine = DeepSpeedEngine(student, made.engine, made.optimizer, groups, micro_batch_size=1)
    engine.train(False)  # no random windows of positions
    targets = LiveTargets(Ensemble(teachers, 16), Statistics(phi_s=False))
    task = StudentTask(made, student, engine, targets)
    sums: dict[str, Tensor] = {}
    for micro_batch in plan.micro_batches(distributed.rank(), 0):
        terms = task.loss(images(micro_batch), micro_batch)
        engine.backward(terms.total * world)
        for name, value in {"loss": terms.total.detach(), **terms.losses, **terms.metrics}.items():
            sums[name] = sums.get(name, torch.zeros(())) + value
    before = engine.weights()
    engine.step(HUGE)
    # Adam's first step is lr * g / (|g| + eps): with both huge, the gradient itself.
    found = {name: before[name] - after for name, after in engine.weights().items()}
    engine.close()
    losses = {name: float(distributed.all_reduce(value.clone())) for name, value in sums.items()}
    encoded = {name: sum(count for count, *_ in t.seen) for name, t in teachers.items()}
    return Step(found, losses, list(sums), encoded)


def plain_gradient() -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every arm whole, in one process, without engine, shares or routes."""
    made = recipe(2, own_ranks=False)
    student = student_of(made).eval()
    firsts = {"low": 0, "high": BATCHES["low"]}
    total, losses = torch.zeros(()), {}
    teachers = {name: Patches(spec).freeze() for name, spec in SPECS.items()}
    means: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for arm, first in firsts.items():
        one = MicroBatch(arm, first, BATCHES[arm], 1, {}, 1, {})
        pixels = images(one)
        heads = student(pixels).heads
        for name in SEEN_BY[arm]:
            patch = SPECS[name].patch_size
            seen = [side * patch // 16 for side in SIZES[arm]]
            target = teachers[name](F.interpolate(pixels, seen, mode="bilinear", antialias=True))
            summary = 1 - F.cosine_similarity(heads[name].summary, target.summary)
            spatial = (heads[name].spatial - target.spatial).square().mean((1, 2, 3))
            means[name, arm] = summary.mean(), spatial.mean()
    for name, arms, weights in (("one", ("low", "high"), (1.0, 2.0)), ("other", ("low",), (1, 1))):
        counts = [WEIGHTS[arm] * BATCHES[arm] for arm in arms]
        for index, kind in enumerate(("summary", "spatial")):
            values = [means[name, arm][index] for arm in arms]
            mean = sum(c * v for c, v in zip(counts, values, strict=True)) / sum(counts)
            losses[f"{name}/{kind}"] = mean.item()
            losses |= {
                f"loss/{arm}/{name}/{kind}": v.item() for arm, v in zip(arms, values, strict=True)
            }
            total = total + weights[index] * mean
    total.backward()
    losses["loss"] = total.item()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}, losses


Case = tuple[int, bool]
CASES: dict[int, list[Case]] = {
    1: [(2, False), (3, True)],
    2: [(1, True), (2, True), (3, True), (2, False), (3, False)],
    4: [(2, True)],
}


def gradients(cases: list[Case]) -> list[Step]:
    return [gradient(*case) for case in cases]


@pytest.mark.parametrize("ranks", CASES)
def test_the_gradient_is_that_of_one_process_with_every_arm_whole(ranks: int) -> None:
    """ZeRO 1 to 3, with and without ranks of their own.

    With them, the second teacher's head has a loss on the ranks of one arm only.
    """
    expected, losses = plain_gradient()
    assert max(float(value.abs().max()) for value in expected.values()) > 0.1
    by_rank = run_on_ranks(ranks, gradients, CASES[ranks])
    for case, steps in zip(CASES[ranks], zip(*by_rank, strict=True), strict=True):
        # Nothing is run in vain: a teacher runs once for each image that it sees, on one rank.
        for name, count in {"one": 12, "other": 8}.items():
            assert sum(step.encoded.get(name, 0) for step in steps) == count, case
        for step in steps:
            assert set(step.names) == losses.keys(), case
            assert step.losses == pytest.approx(losses, rel=1e-5), case
            assert step.gradients.keys() >= expected.keys()
            for name, value in step.gradients.items():
                due = expected.get(name, torch.zeros_like(value))
                torch.testing.assert_close(value, due, rtol=1e-4, atol=1e-6, msg=f"{case} {name}")


def _calibration_batches(plan: StepPlan, steps: int) -> Any:
    before = dict.fromkeys(SPECS, 0)
    for step in range(steps):
        for micro_batch in plan.micro_batches(distributed.rank(), step):
            yield CalibrationBatch(images(micro_batch) + step, micro_batch.routes, dict(before))
        before = {name: before[name] + count for name, count in plan.images_of(step).items()}


def estimate(own_ranks: bool, folder: str) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, int]]:
    """Every teacher's statistics, and the images that this rank ran each for."""
    made = recipe(2, own_ranks)
    plan = made.step_plan(distributed.world_size())
    mine = plan.teachers_of(distributed.rank())
    teachers = {name: Patches(SPECS[name]).freeze() for name in SPECS if name in mine}
    ensemble, statistics = Ensemble(teachers, 16), Statistics()
    outcome = statistics.fit(ensemble, _calibration_batches(plan, 9), Path(folder), {}, 24)
    assert set(outcome.values()) == {"estimated"}
    assert set(statistics.fit(ensemble, iter(()), Path(folder), {}, 24).values()) == {"cached"}
    found = {n: (s.phi_s.mean, s.phi_s.alpha, s.dispersion) for n, s in statistics.of.items()}
    return found, {n: sum(count for count, *_ in t.seen) for n, t in teachers.items()}


@pytest.mark.parametrize(("ranks", "own"), [(2, False), (2, True), (4, True)])
def test_a_teacher_has_one_estimate_over_all_its_arms_which_every_rank_gets(
    ranks: int, own: bool, tmp_path: Path
) -> None:
    """At least 24 images in whole steps: two of 12 for one, three of 8 for the other."""
    ((alone, ran),) = run_on_ranks(1, estimate, own, str(tmp_path / "alone"))
    assert ran == {"one": 24, "other": 24}
    shared = run_on_ranks(ranks, estimate, own, str(tmp_path / "shared"))
    for statistics, _ in shared:
        assert statistics.keys() == alone.keys()
        for name, values in statistics.items():
            for value, due in zip(values, alone[name], strict=True):
                torch.testing.assert_close(value, due, rtol=1e-4, atol=1e-6)
    for name in SPECS:
        assert sum(seen.get(name, 0) for _, seen in shared) == 24
