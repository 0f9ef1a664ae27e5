"""How a student's run builds its teachers."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill.errors import RecipeError
from distill.recipe import StudentRecipe
from distill.student_task import build_teachers
from teachers.features import Features
from teachers.teacher import TeacherConfig
from teachers.timm_teacher import TimmTeacher
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
    recipe = _recipe({"kind": "tests.test_distill_student_task:Forgetful"})
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
            "objective.equivariance.limit: crops 2 tokens apart share nothing .* has 2; use at "
            "most 1, or a larger run.resolution",
        ),
        (
            {"objective": {"mesa": {}}},
            "engine.ema_decay: is 0, .*; or leave objective.mesa out",
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


def test_a_class_that_cannot_do_without_weights_is_named_where_they_are_not_due() -> None:
    recipe = _recipe({"kind": "tests.test_distill_student_task:Measuring"})
    assert build_teachers(recipe)["mine"].spec.spatial_dim == 8
    message = r"teachers\.mine: cannot be built without its weights, on torch's meta device, .* dry"
    with pytest.raises(RecipeError, match=message):
        build_teachers(recipe, set())
