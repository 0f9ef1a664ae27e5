"""Recipes: strict keys, typed overrides, checks across sections, and the words of each mistake."""

from pathlib import Path
from typing import Any

import pytest

from distill.runtime.config import apply_overrides, dump_yaml, load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from distill.training.training_recipe import resolved

BASE = """
run: {dir: runs/x, steps: 100, resolution: 64, batch_size: 8}
data: {sources: [{shards: shards}]}
teachers:
  clip: {kind: dfn_clip, model: clip_ti16_128}
  siglip: {kind: siglip, model: siglip_ti16_128}
student: {size: tiny}
"""


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> StudentRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_student_recipe(path, list(overrides))


def test_a_resolved_recipe_loads_again_as_itself(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(resolved(recipe)))
    assert load_student_recipe(path, []) == recipe


def test_a_recipe_in_another_encoding_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("run: {dir: caf\u00e9}".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe.yaml: byte 14 is not UTF-8; save .* as UTF-8"):
        load_yaml(path)
    path.write_bytes("\ufeffrun: {dir: caf\u00e9}".encode())
    assert load_yaml(path) == {"run": {"dir": "caf\u00e9"}}


def test_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    recipe = load(tmp_path, "optimizer.lr=1e-4", "run.seed=12")
    assert (recipe.optimizer.lr, recipe.run.seed) == (1e-4, 12)


def test_overrides_reach_into_lists_and_make_sections(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, "data.sources.0.weight=3", "engine.zero_stage=3", "run.resolution=[32, 64]"
    )
    assert recipe.data.sources[0].weight == 3
    assert recipe.engine.zero_stage == 3
    assert recipe.run.resolution.fixed == (32, 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "run.stepz=3",
            r"run.stepz: unknown key \(did you mean 'steps'\?\); choose from dir, seed",
        ),
        ("enginee.zero_stage=1", r"enginee: unknown key \(did you mean 'engine'\?\)"),
        ("engine.zero_stage=0", "engine.zero_stage: ZeRO 0 is not supported"),
        ("engine.zero_stage=4", "engine.zero_stage: must be 1, 2 or 3, got 4"),
        ("engine.precision=bf17", r"engine.precision: .*got 'bf17' \(did you mean 'bf16'\?\)"),
        ("run.steps=many", "run.steps: .*valid integer.*got 'many'"),
        ("optimizer.lr=-1", "optimizer.lr: .*greater than 0, got -1"),
        ("teachers.clip.kind=dfn_clap", "teachers.clip: kind: 'dfn_clap' is unknown.*'dfn_clip'"),
        ("teachers.clip.modle=x", r"teachers.clip: modle: unknown key \(did you mean 'model'\?\)"),
        ("teachers={}", "teachers: expected at least 1 item, got {}"),
        ("teachers.my-clip={kind: dfn_clip, model: clip_ti16_128}", "letters, digits and _"),
        (
            "objective.weights.dino={spatial: 0}",
            "objective.weights.dino: no such teacher.*clip, sig",
        ),
        (
            "run.resolution=100",
            r"expected multiples .*patch size of 16 px, got \[100, 100\].*\[96, 96\]",
        ),
        ("schedule.warmup_steps=100", "warmup_steps: 100 must be less than the run's 100 steps"),
        ("run.dir=", "run.dir: .*got None"),
        ("run.steps", "override 'run.steps': write it as section.key=value"),
        ("run.steps.more=1", "override 'run.steps.more=1': run.steps is not a mapping"),
        ("data.sources.3.weight=1", "data.sources is a list of 1; '3' is not one of 0 to 0"),
        ("run.steps=[1", "override 'run.steps=.*"),
        (
            "run.resolution=64px",
            r"expected a whole number or a pair \[height, width\], got '64px'$",
        ),
        ("run.resolution=[64,64,3]", r"pair \[height, width\], got \[64, 64, 3\]$"),
        ("run.resolution=[]", "yaml: run.resolution: the list is empty; give a number"),
        (
            "student.init={kind: tim, model: x}",
            r"student.init.kind: 'tim' is unknown \(did you mean 'timm'\?\); choose one of timm",
        ),
        (
            "objective.equivariance={kind: shfit}",
            r"equivariance.kind: 'shfit' is unknown \(did you mean 'shift'\?\); .*homography$",
        ),
        (
            "data.augmentation=nonee",
            r"yaml: data.augmentation: .*'nonee' \(did you mean 'none'",
        ),
        (
            "data.augmentation={scale: [1.0, 0.1]}",
            "yaml: data.augmentation: scale: the smallest value, 1.0, is above the largest, 0.1$",
        ),
        ("teachers=[clip]", r"teachers: expected a mapping, got \['clip'\]"),
        (
            "teachers.clip.upsampler={kind: bilinear, factor: 1.5}",
            r"factor: expected a whole number or a pair \[height, width\], got 1.5(?!, got 1.5)",
        ),
        (
            "window_augmentation={probability: 0.5, sizes: [7, 9]}",
            r"sizes: none of \[7, 9\] divides a grid of the student, 4 x 4; use some of",
        ),
        (
            "student.isolated=[clop]",
            r"student.isolated.clop: no such teacher \(did you mean 'clip'",
        ),
        ("student.head.upsample={sam: 2}", "student.head.upsample.sam: no such teacher; there are"),
    ],
)
def test_each_mistake_is_named_by_its_path(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, override)


def test_several_mistakes_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="run.stepz(.|\n)*engine.zero_stage"):
        load(tmp_path, "run.stepz=3", "engine.zero_stage=0")


def test_a_missing_section_is_said_to_be_required(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="student: required, but not given"):
        load(tmp_path, text=BASE.replace("student: {size: tiny}", ""))


def test_a_key_written_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='duplicate key "student"'):
        load(tmp_path, text=BASE + "student: {size: base}\n")


def test_a_missing_file_names_the_closest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(BASE)
    with pytest.raises(RecipeError, match=r"No such file.*did you mean '.*quickstart.yaml'"):
        load_yaml(tmp_path / "quickstrat.yaml")


def test_a_list_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(RecipeError, match="a recipe is a mapping of sections, got list"):
        load_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "message"),
    [
        (8, None, 3, "8 images do not divide over 3 ranks; use 6 or 9, or ranks .* such as 2"),
        (16, 3, 2, r"3 does not divide a rank's share of 8 images \(16 over 2 ranks\).* is 2"),
    ],
)
def test_a_batch_that_does_not_divide_says_what_does(
    batch: int, micro: int | None, ranks: int, message: str, tmp_path: Path
) -> None:
    values: list[str] = [f"run.batch_size={batch}"]
    if micro:
        values.append(f"run.micro_batch_size={micro}")
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, *values).require_ranks(ranks)


def test_a_batch_divides_over_ranks_and_micro_batches(tmp_path: Path) -> None:
    for overrides, images, passes in (((), 2, 1), (("run.micro_batch_size=1",), 1, 2)):
        made = load(tmp_path, *overrides).step_plan(4).micro_batches(3, 0)
        assert [one.images for one in made] == [images] * passes


def test_a_micro_batch_is_never_more_than_a_ranks_share(tmp_path: Path) -> None:
    (only,) = load(tmp_path, "run.micro_batch_size=6").step_plan(4).micro_batches(0, 0)
    assert only.images == 2


def test_overrides_do_not_touch_the_rest() -> None:
    tree: dict[str, Any] = {"a": {"b": 1, "c": [1, {"d": 2}]}}
    apply_overrides(tree, ["a.c.1.d=5", "x.y=z"])
    assert tree == {"a": {"b": 1, "c": [1, {"d": 5}]}, "x": {"y": "z"}}


def test_validation_returns_the_typed_recipe(tmp_path: Path) -> None:
    tree = load_yaml(load_path(tmp_path))
    assert isinstance(validate(StudentRecipe, tree, "here"), StudentRecipe)


def load_path(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    return path
