"""Recipes of students that are networks of timm: overrides, routes, and what only a ViT has."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.runtime.config import dump_yaml, load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.runtime.resuming import Change, content_of
from distill.tasks.build import build_targets
from distill.tasks.cached_targets import cache_facts
from distill.tasks.route_table import route_rows, route_table
from distill.tasks.student_kind import override_student
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from distill.training.training_recipe import resolved
from student.config import StudentConfig
from student.timm_config import TimmStudentConfig
from teachers.features import FeatureSpec
from tests.doubles import Patches

BASE = """
run: {dir: runs/x, steps: 100, resolution: 64, batch_size: 8}
data: {sources: [{shards: shards}]}
teachers:
  clip: {kind: dfn_clip, model: clip_ti16_128}
student: {size: tiny, depth: 2, init: {kind: timm, model: vit_tiny_patch16_224},
          head: {hidden_dim: 16}}
"""
SWITCH = ("student.kind=timm", "student.model=test_convnext")
TIMM = BASE.partition("student:")[0] + "student: {kind: timm, model: test_convnext}\n"


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> StudentRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_student_recipe(path, list(overrides))


def test_an_override_of_the_kind_leaves_out_what_only_the_other_kind_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "teachers"):
        recipe = load(tmp_path, *SWITCH)
    assert isinstance(recipe.student, TimmStudentConfig)
    assert recipe.student.head.hidden_dim == 16
    assert "the recipe's size, depth, init under student are left out" in caplog.text
    back = load(tmp_path, "student.kind=vit", "student.depth=3", text=TIMM)
    assert isinstance(back.student, StudentConfig)
    assert back.student.shape.depth == 3


def test_the_kind_of_before_is_the_default_and_is_not_written(tmp_path: Path) -> None:
    tree = resolved(load(tmp_path))
    assert "kind" not in tree["student"]
    for text in (BASE, TIMM):
        recipe = load(tmp_path, text=text)
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_yaml(resolved(recipe)))
        assert load_student_recipe(path, []) == recipe


def test_keys_of_other_overrides_are_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="student: depth: only for kind: vit"):
        load(tmp_path, *SWITCH, "student.depth=4")
    tree = {"student": {"size": "tiny"}}
    override_student(tree, ["student.kind=other"])
    assert tree == {"student": {"size": "tiny", "kind": "other"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.kind=tim"], "student.kind: 'tim' is unknown .did you mean 'timm'"),
        (["student.kind=timm"], "student.model: required, but not given"),
        (["student.model=test_convnext"], "student: model: only for kind: timm"),
        ([*SWITCH, "student.modle=x"], "student.modle: unknown key .did you mean 'model'"),
        ([*SWITCH, "student.level=9"], "student: level: .* has no level 9"),
        ([*SWITCH, "run.resolution=80"], "run.resolution: expected multiples .* of 32 px.*64, 64"),
        ([*SWITCH, "window_augmentation.probability=0.5"], "window_augmentation: is only for"),
        ([*SWITCH, "reparametrisation.damp=0.1"], "reparametrisation.damp: is only for"),
        ([*SWITCH, "reparametrisation.spectral=trunk"], "reparametrisation.spectral: is only"),
        (
            [*SWITCH, "student.init={kind: student, path: x}", "finetuning.trunk=low_rank"],
            "finetuning.trunk: low_rank is only for student.kind: vit.*; use frozen",
        ),
        ([*SWITCH, "student.head.upsample={klip: 2}"], "student.head.upsample.klip: no such"),
    ],
)
def test_mistakes_name_their_key(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, *overrides)


def teachers(**options: Any) -> dict[str, Patches]:
    return {
        name: Patches(
            FeatureSpec(
                summary_dim=3,
                spatial_dim=5,
                patch_size=patch,
                resolution=(4 * patch, 4 * patch),
                any_resolution=True,
            )
        )
        for name, patch in (("fine", 14), ("coarse", 32))
    }


def recipe_of(**student: Any) -> StudentRecipe:
    entry = {"kind": "timm", "model": "test_vit", "weights": "none"}
    tree = {
        "run": {"dir": "unused", "steps": 10, "batch_size": 2, "resolution": [64, 128]},
        "data": {"sources": [{"shards": "unused"}]},
        "teachers": {"fine": entry, "coarse": entry},
        "student": {"kind": "timm", "model": "test_convnext", **student},
    }
    return validate(StudentRecipe, tree, "test")


def test_teachers_run_for_the_grid_of_their_head() -> None:
    """A student of stride 32: cells of 16 px for patches of 14 px, and its own for 32 px."""
    recipe = recipe_of()
    rows = {row.teacher: row for row in route_rows(recipe, teachers())}
    assert {row.student_grid for row in rows.values()} == {(2, 4)}
    assert (rows["fine"].route.grid, rows["fine"].route.input_size) == ((4, 8), (56, 112))
    assert (rows["coarse"].route.grid, rows["coarse"].route.input_size) == ((2, 4), (64, 128))
    assert " on " not in route_table(list(rows.values()))
    targets = build_targets(recipe, teachers()).ensemble(torch.rand(1, 3, 64, 128))
    assert targets["fine"].spatial.shape == (1, 5, 4, 8)


def test_a_stated_upsampling_decides_on_the_grid_and_a_level_on_the_stride() -> None:
    stated = recipe_of(head={"upsample": {"fine": 1}})
    assert stated.cell_sizes(teachers()) == {"fine": 32, "coarse": 32}
    assert recipe_of(level=2).cell_sizes(teachers()) == {"fine": 16, "coarse": 16}
    assert cache_facts(stated)["student"] != cache_facts(recipe_of())["student"]


def test_the_recipe_of_a_vit_is_cached_under_the_facts_of_before(tmp_path: Path) -> None:
    assert cache_facts(load(tmp_path))["student"] == {"patch_size": 16}


def test_initial_weights_may_move_as_the_checkpoint_has_all() -> None:
    assert content_of(Change("student.weights", "a.safetensors", "b.safetensors")) == ""


def test_the_quickstart_takes_the_other_kind(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "recipes/quickstart.yaml"
    assert "kind" not in load_yaml(path)["student"]
    recipe = load_student_recipe(path, ["student.kind=timm", "student.model=convnext_atto"])
    assert recipe.student.patch_size == 32
    assert recipe.student.head.hidden_dim == 384
