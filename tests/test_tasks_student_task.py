"""How a student's run builds its teachers, and what it asks of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill.engine.engine import Engine
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.tasks.build import build_student, build_targets, build_teachers
from distill.tasks.route_table import route_rows
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.student_task import StudentTask
from student.model import Student
from teachers.features import Features
from teachers.teacher import Teacher, TeacherConfig
from teachers.timm_teacher import TimmTeacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.tile import Tile
from tests.doubles import Curved


class Forgetful(Curved):
    """A user's class that left dropout on."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()

    def extract(self, images: Tensor) -> Features:
        return Features(images.mean((2, 3)), nn.functional.dropout(self.net(images)))


def _recipe(teacher: dict[str, Any], **sections: Any) -> StudentRecipe:
    return StudentRecipe.model_validate(
        {
            "task": "student",
            "run": {"dir": Path("unused"), "steps": 1, "batch_size": 2, "resolution": 32},
            "data": {"sources": [{"shards": "unused"}]},
            "teachers": {"mine": teacher},
            "student": {"size": "tiny", "max_resolution": 32},
            "schedule": {"warmup_steps": 0},
            **sections,
        }
    )


def test_a_users_class_is_tried_before_it_teaches() -> None:
    recipe = _recipe({"kind": "tests.test_tasks_student_task:Forgetful"})
    with pytest.raises(RecipeError, match=r"teachers\.mine: Forgetful.*differs from call to call"):
        build_teachers(recipe)


def test_a_built_in_teacher_encodes_nothing_before_it_teaches() -> None:
    recipe = _recipe({"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"})
    with patch.object(TimmTeacher, "extract", side_effect=AssertionError), torch.no_grad():
        assert build_teachers(recipe)["mine"].spec.spatial_dim == 192


TIMM = {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"equivariance": {"kind": "shift"}}},
            "objective.equivariance.limit: crops 2 tokens apart do not .* 2 tokens on a side; use "
            "at most 1, or a larger run.resolution",
        ),
        (
            {"objective": {"mesa": {}}},
            "engine.ema_decay: is 0, .*; or remove objective.mesa",
        ),
        (
            {"objective": {"mesa": {}}, "engine": {"ema_decay": 0.9, "zero_stage": 3}},
            "engine.zero_stage: 3 leaves no rank",
        ),
    ],
)
def test_an_objective_that_cannot_work_is_refused(sections: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _recipe(TIMM, **sections)


def test_a_teacher_that_no_loss_counts_for_comes_without_weights() -> None:
    silent = {"weights": {"mine": {"summary": 0, "spatial": 0}}}
    teacher = build_teachers(_recipe(TIMM, objective=silent))["mine"]
    assert {p.device.type for p in teacher.parameters()} == {"meta"}
    assert teacher.spec.spatial_dim == 192
    heard = {"weights": {"mine": {"summary": 0, "spatial": 0.1}}}
    teacher = build_teachers(_recipe(TIMM, objective=heard))["mine"]
    assert {p.device.type for p in teacher.parameters()} == {"cpu"}


class Measuring(Curved):
    """A user's class whose constructor looks at its weights."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.scale = float(self.net.weight.detach().abs().max())


def test_a_class_that_cannot_do_without_weights_is_built_with_them_for_its_spec() -> None:
    recipe = _recipe({"kind": "tests.test_tasks_student_task:Measuring"})
    assert build_teachers(recipe)["mine"].spec.spatial_dim == 8
    teacher = build_teachers(recipe, set())["mine"]
    assert teacher.spec.spatial_dim == 8
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


class Spoiled(Curved):
    """A teacher that mistakes one of the images it encodes for another."""

    def __init__(self, *, any_resolution: bool = False) -> None:
        super().__init__()
        self.spec = replace(self.spec, any_resolution=any_resolution)
        self.spoiled: int | None = None

    def extract(self, images: Tensor) -> Features:
        before = sum(self.batches)
        summary, spatial = super().extract(images)
        assert summary is not None
        if self.spoiled is not None and before <= self.spoiled < before + len(images):
            summary[self.spoiled - before] *= torch.tensor([1.0, -1.0, 1.0])
            spatial[self.spoiled - before] += 1
        return Features(summary, spatial)


class Idle:
    """What the task asks of an engine for a loss."""

    steps = 0

    def __init__(self, student: Student) -> None:
        self.student = student

    def __call__(self, *inputs: Any) -> Any:
        return self.student(*inputs)


def _step(recipe: StudentRecipe, teachers: dict[str, Teacher]) -> Callable[[], list[float]]:
    """The losses of a step's micro-batches, on the same images every time."""
    student = build_student(recipe, teachers).eval()
    engine = cast(Engine, Idle(student))
    targets = build_targets(recipe, teachers)
    micro_batches = recipe.step_plan(1).micro_batches(0, 0)
    sizes = [recipe.arms[each.arm].resolution.root[0].size for each in micro_batches]
    images = [torch.rand(p.images, 3, *size) for p, size in zip(micro_batches, sizes, strict=True)]

    def losses() -> list[float]:
        task = StudentTask(recipe, student, engine, targets)
        distributed.seed_default_generators(0, "forward")
        pairs = zip(images, micro_batches, strict=True)
        return [float(task.loss(x, each).total.detach()) for x, each in pairs]

    return losses


@pytest.mark.long
def test_a_step_of_two_arms_runs_what_its_table_says_and_every_pass_counts() -> None:
    """An image that any pass mistakes for another changes the step's loss: none is for nothing."""
    encoders = {"tiled": Spoiled(), "fixed": Spoiled(), "free": Spoiled(any_resolution=True)}
    tiled = UpsampledTeacher(encoders["tiled"], Tile(encoders["tiled"].spec, (2, 2)))
    teachers: dict[str, Teacher] = {**encoders, "tiled": tiled}
    recipe = _recipe(
        TIMM,
        run={"dir": Path("unused"), "steps": 1},
        teachers=dict.fromkeys(teachers, TIMM),
        arms={
            "low": {"resolution": (12, 20), "batch_size": 2},
            "high": {"resolution": (24, 40), "batch_size": 1},
        },
        student={"size": "tiny", "depth": 1, "patch_size": 4, "max_resolution": 40},
        objective={"standardisation": "none"},
    )
    due = dict.fromkeys(teachers, 0)
    for row in route_rows(recipe, teachers):
        due[row.teacher] += row.batch_size * row.route.forwards // row.route.images
    assert due == {"tiled": 2 + 5, "fixed": 2 + 1, "free": 2 + 1}
    losses = _step(recipe, teachers)
    right = losses()
    assert {name: sum(encoder.batches) for name, encoder in encoders.items()} == due
    for name, encoder in encoders.items():
        for encoder.spoiled in range(due[name]):
            encoder.seen.clear()
            assert losses() != right, (name, encoder.spoiled)
        encoder.spoiled = None
        encoder.seen.clear()
    assert losses() == right
