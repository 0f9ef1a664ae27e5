"""How a student's run builds its teachers."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
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


def _recipe(teacher: dict[str, Any]) -> StudentRecipe:
    return StudentRecipe.model_validate(
        {
            "task": "student",
            "run": {"dir": Path("unused"), "steps": 1, "batch_size": 2, "resolution": 32},
            "data": {"sources": [{"shards": "unused"}]},
            "teachers": {"mine": teacher},
            "student": {"size": "tiny", "max_resolution": 32},
            "schedule": {"warmup_steps": 0},
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
