"""What may differ when a run goes on in its folder."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from data.files import read_json_lines
from distill.runtime.config import load_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import confirm_run_folder, open_run_folder

RECIPE: dict[str, Any] = {
    "run": {"dir": "runs/x", "steps": 10, "seed": 0},
    "arms": {
        "low": {
            "resolution": [{"size": [64, 64], "batch_size": 8, "micro_batch_size": 4}],
            "batch_size": 8,
            "micro_batch_size": None,
        }
    },
    "tracking": {"every": 1},
    "engine": {"zero_stage": 2, "precision": "fp32"},
    "targets": {"precision": "fp32"},
}


def test_the_length_the_logs_and_micro_batches_wherever_they_are_set(tmp_path: Path) -> None:
    open_run_folder(tmp_path, RECIPE)
    other = deepcopy(RECIPE)
    other["run"]["steps"] = 20
    other["tracking"]["every"] = 5
    other["arms"]["low"]["micro_batch_size"] = 2
    other["arms"]["low"]["resolution"][0]["micro_batch_size"] = 1
    open_run_folder(tmp_path, other)


def test_what_ranks_split_and_where_teachers_wait_may_change(tmp_path: Path) -> None:
    open_run_folder(tmp_path, RECIPE)
    other = deepcopy(RECIPE)
    other["engine"]["zero_stage"] = 3
    other["targets"]["placement"] = {"clip": "sharded"}
    open_run_folder(tmp_path, other)
    other["engine"]["precision"] = "bf16"
    with pytest.raises(RecipeError, match=r"engine.precision: 'fp32' there, 'bf16' here"):
        open_run_folder(tmp_path, other)


def test_what_decides_nothing_may_change(tmp_path: Path) -> None:
    """How images are read, where things are kept, memory: the stream and the steps stay."""
    data: dict[str, Any] = {"sources": [{"shards": ["a"], "weight": 1.0}], "workers": 2}
    data |= {"prefetch": 2, "worker_start": "fork", "index_dir": None, "decoder": "auto"}
    first = {**RECIPE, "data": data, "teachers": {"clip": {"chunk_size": None}}}
    open_run_folder(tmp_path, first)
    other = deepcopy(first)
    other["data"] |= {"workers": 8, "prefetch": 4, "worker_start": "spawn", "decoder": "pil"}
    other["data"]["index_dir"] = "/elsewhere"
    other["teachers"]["clip"]["chunk_size"] = 2
    other["run"] |= {"dir": "runs/y", "watchdog_s": 7.0, "ranks_wait_s": 8.0, "resume": "anyway"}
    assert open_run_folder(tmp_path, other) == []


def test_all_that_decides_is_told_with_what_it_changes_and_the_way_on(tmp_path: Path) -> None:
    open_run_folder(tmp_path, RECIPE)
    other = deepcopy(RECIPE)
    other["run"]["seed"] = 3
    other["optimizer"] = {"lr": 0.5}
    with pytest.raises(RecipeError) as refused:
        open_run_folder(tmp_path, other)
    text = str(refused.value)
    assert "another recipe (run.seed: 0 there, 3 here; optimizer.lr: None there, 0.5 here)" in text
    assert "\n  run.seed -> other random numbers: order, crops and initial weights\n" in text
    assert "\n  optimizer.lr -> other steps of the optimiser\n" in text
    assert "run.resume=anyway" in text
    assert "remove" not in text
    assert load_yaml(tmp_path / "recipe.yaml") == RECIPE


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            {"final_norm": True, "head": {"attention_blocks": 0}},
            "student.final_norm: True there, False here",
        ),
        (
            {"final_norm": False, "head": {"attention_blocks": 2}},
            "student.head.attention_bias: True there, False here",
        ),
        ({"final_norm": False, "head": {"attention_blocks": 0}}, None),
    ],
)
def test_a_run_under_older_defaults_is_told_and_how_to_keep_them(
    old: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    open_run_folder(tmp_path, {**RECIPE, "student": old})
    head = {**old["head"], "attention_bias": False}
    new = {**RECIPE, "student": {"final_norm": False, "head": head}}
    if message is None:
        assert open_run_folder(tmp_path, new) == []
        return
    with pytest.raises(RecipeError) as refused:
        open_run_folder(tmp_path, new)
    key = message.partition(":")[0]
    assert f"({message})" in str(refused.value)
    assert f"{key} -> another student, which the checkpoint may not fit" in str(refused.value)
    assert f"keep what that run has by {key}=true, or go on" in str(refused.value)


def test_going_on_anyway_is_noted(tmp_path: Path) -> None:
    open_run_folder(tmp_path, RECIPE)
    other = {**deepcopy(RECIPE), "optimizer": {"lr": 0.5}}
    found = open_run_folder(tmp_path, other, anyway=True)
    confirm_run_folder(tmp_path, other, found, ({}, {}), step=7, anyway=True)
    assert load_yaml(tmp_path / "recipe.yaml") == other
    noted = {"step": 7, "key": "optimizer.lr", "old": None, "new": 0.5}
    assert read_json_lines(tmp_path / "changes.jsonl") == [noted]


IMAGES = {"data.sources.0": "9 samples, abc", "teachers.clip": "1234"}
PLACES: dict[str, Any] = {
    **RECIPE,
    "data": {"sources": [{"shards": ["/a/x.tar"], "weight": 1.0}]},
    "teachers": {"clip": {"kind": "timm", "weights": "/a/clip.pt"}},
}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (IMAGES, None),
        (
            IMAGES | {"data.sources.0": "8 samples, def"},
            r"(?s)data\.sources\.0\.shards: \['/a/x.tar'\] there, \['/b/x.tar'\] here\).*"
            r"data\.sources\.0\.shards -> other images: the stream differs from the first step",
        ),
        (IMAGES | {"teachers.clip": "99"}, r"teachers\.clip\.weights -> other targets"),
    ],
)
def test_what_has_moved_may_go_on_if_its_contents_are_the_same(
    now: dict[str, str], message: str | None, tmp_path: Path
) -> None:
    open_run_folder(tmp_path, PLACES)
    other = deepcopy(PLACES)
    other["data"]["sources"][0]["shards"] = ["/b/x.tar"]
    other["teachers"]["clip"]["weights"] = "/b/clip.pt"
    found = open_run_folder(tmp_path, other)
    assert load_yaml(tmp_path / "recipe.yaml") == PLACES
    if message is None:
        confirm_run_folder(tmp_path, other, found, (IMAGES, now), step=1)
        assert load_yaml(tmp_path / "recipe.yaml") == other
    else:
        with pytest.raises(RecipeError, match=message):
            confirm_run_folder(tmp_path, other, found, (IMAGES, now), step=1)
        assert load_yaml(tmp_path / "recipe.yaml") == PLACES


def test_contents_that_changed_at_their_place_are_told(tmp_path: Path) -> None:
    open_run_folder(tmp_path, PLACES)
    now = IMAGES | {"data.sources.0": "8 samples, def"}
    with pytest.raises(RecipeError, match=r"data\.sources\.0 -> other images"):
        confirm_run_folder(tmp_path, PLACES, [], (IMAGES, now), step=1)
    confirm_run_folder(tmp_path, PLACES, [], ({}, now), step=0)  # nothing is trained yet


def test_an_arms_batch_may_not(tmp_path: Path) -> None:
    open_run_folder(tmp_path, RECIPE)
    other = deepcopy(RECIPE)
    other["arms"]["low"]["batch_size"] = 16
    with pytest.raises(RecipeError, match=r"arms.low.batch_size: 8 there, 16 here"):
        open_run_folder(tmp_path, other)
