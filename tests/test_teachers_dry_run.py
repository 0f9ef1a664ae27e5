"""What passes the check of a user's class trains too, and needs no weights where none are due."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distill.runtime.errors import RecipeError
from distill.tasks.build import build_teachers
from distill.tasks.student_recipe import StudentRecipe
from teachers.build import build_teacher, parse_teacher
from teachers.catalog import licence_of
from teachers.errors import TeacherError
from teachers.teacher import TeacherConfig
from teachers.testing import check_teacher
from tests.doubles import Curved, Patches

HERE = "tests.test_teachers_dry_run"

with warnings.catch_warnings():  # pydantic's, of a field that has the name of a method
    warnings.simplefilter("ignore", UserWarning)

    class FieldConfig(TeacherConfig):
        licence: str = "my own"  # type: ignore[assignment]

    class NumberConfig(TeacherConfig):
        licence: int = 3  # type: ignore[assignment]


class VariableConfig(TeacherConfig):
    licence: ClassVar[str] = "my own"  # type: ignore[assignment,misc]


class MethodConfig(TeacherConfig):
    def licence(self) -> str:
        return "my own"


class SilentConfig(TeacherConfig):
    def licence(self) -> Any:
        return 3


class Own(Curved):
    Config = TeacherConfig

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()


class WithField(Own):
    Config = FieldConfig


class WithVariable(Own):
    Config = VariableConfig


class WithMethod(Own):
    Config = MethodConfig


class WithNumber(Own):
    Config = NumberConfig


class Silent(Own):
    Config = SilentConfig


def recipe_of(kind: type[Own], **options: Any) -> StudentRecipe:
    return StudentRecipe.model_validate(
        {
            "run": {"dir": Path("unused"), "steps": 1, "batch_size": 2, "resolution": 32},
            "data": {"sources": [{"shards": "unused"}]},
            "teachers": {"mine": {"kind": f"{HERE}:{kind.__name__}", **options}},
            "student": {"size": "tiny", "max_resolution": 32},
            "schedule": {"warmup_steps": 0},
        }
    )


@pytest.mark.parametrize("kind", [WithField, WithVariable, WithMethod])
def test_a_licence_is_a_text_or_a_method(kind: type[Own]) -> None:
    recipe = recipe_of(kind)
    check_teacher(build_teachers(recipe)["mine"])
    assert licence_of(recipe.teachers["mine"]) == "my own"


def test_a_licence_of_another_type_is_refused_by_the_check_and_before_training() -> None:
    entry = {"kind": f"{HERE}:WithNumber"}
    with pytest.raises(TeacherError, match="WithNumber: NumberConfig.licence must be a text"):
        check_teacher(build_teacher(parse_teacher(entry)))
    with pytest.raises(RecipeError, match=r"teachers.mine: .*licence must be a text"):
        build_teachers(recipe_of(WithNumber))
    with pytest.raises(RecipeError, match=r"teachers.mine: SilentConfig.licence: .* got 3"):
        build_teachers(recipe_of(Silent))


class LoadingConfig(TeacherConfig):
    file: Path


class Loading(Patches):
    """Loads its weights itself."""

    Config = LoadingConfig

    def __init__(self, config: LoadingConfig) -> None:
        super().__init__()
        self.net.load_state_dict(torch.load(config.file, weights_only=True))


class Measuring(Loading):
    """And looks at their values."""

    def __init__(self, config: LoadingConfig) -> None:
        super().__init__(config)
        self.largest = float(self.net.weight.abs().max())


@pytest.mark.parametrize("kind", [Loading, Measuring])
def test_a_dry_run_builds_a_class_that_loads_weights_and_warns_of_nothing(
    kind: Any, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pt"
    torch.save(Patches().net.state_dict(), file)
    recipe = recipe_of(kind, file=file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (teacher,) = build_teachers(recipe, set()).values()
    assert {p.device.type for p in teacher.parameters()} == {"meta"}
    assert teacher.spec == build_teachers(recipe)["mine"].spec


@pytest.mark.parametrize("kind", [Loading, Measuring])
@pytest.mark.parametrize("names", [None, set()])
def test_a_class_that_cannot_be_built_gets_its_own_error_and_not_metas(
    kind: Any, names: set[str] | None, tmp_path: Path
) -> None:
    recipe = recipe_of(kind, file=tmp_path / "none.pt")
    message = rf"^teachers.mine: {HERE}:\w+ cannot be built: FileNotFoundError: .*none.pt"
    with pytest.raises(RecipeError, match=message):
        build_teachers(recipe, names)


def test_a_users_weights_that_are_not_finite_are_told_with_the_teachers_name(
    tmp_path: Path,
) -> None:
    state = Patches().net.state_dict()
    state["weight"][0, 0, 0, :2] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        RecipeError, match=r"^teachers.mine: weights: 2 of 384 values of net.weight"
    ):
        build_teachers(recipe_of(Loading, file=tmp_path / "weights.pt"))  # type: ignore[arg-type]
