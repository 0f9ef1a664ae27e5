"""What is built of a recipe, and refused before any image is read."""

import pytest

from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.tasks.build import build_targets
from distill.tasks.student_recipe import StudentRecipe
from teachers.build import build_teacher


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
        assert list(build_targets(recipe, teachers).ensemble.teachers) == ["clip"]
        return
    message = rf"teachers.clip: students of {refused} px have a grid of .*add one of"
    with pytest.raises(RecipeError, match=message):
        build_targets(recipe, teachers)
