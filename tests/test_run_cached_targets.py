"""Whole runs on cached targets: the losses of runs with teachers; and what is refused."""

import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.tracking import read_metrics
from distill.targets.target_cache import TargetCache, stored_views
from distill.tasks import cached_targets
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.student_run import preview
from distill.write_targets import main
from tests.tiny_run import plain_command, run, tiny_recipe

pytestmark = pytest.mark.process

STEPS = 6
DATA = {"augmentation": {"scale": [0.5, 1.0]}}


def recipe_in(folder: Path, shards: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    here = {
        "run": {"steps": STEPS, "dir": str(folder / "run")},
        "data": {**DATA, "sources": [{"shards": str(shards)}]},
        "objective": {"summary": "angle"},
    }
    merged = {k: {**here.get(k, {}), **sections.get(k, {})} for k in {**here, **sections}}
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(tiny_recipe(shards.parent, **merged)))
    return path


def write(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["write_targets", *map(str, arguments)])
        main()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in fp16 over a run's images, beside their shards."""
    root = tmp_path_factory.mktemp("cached")
    tiny_recipe(root)  # writes the shards
    recipe = recipe_in(root / "writer", root / "shards")
    write(recipe, root / "cache", "--precision", "fp16")
    return root / "cache"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "run")]


def test_a_run_on_cached_targets_has_the_losses_of_one_with_its_teachers(
    cache: Path, tmp_path: Path
) -> None:
    shards = cache.parent / "shards"
    live = recipe_in(tmp_path / "live", shards)
    tracking = {"every": 1, "pictures_every": STEPS}
    cached = recipe_in(
        tmp_path / "cached", shards, targets={"cached": str(cache)}, tracking=tracking
    )
    for recipe in (live, cached):
        done = run(plain_command(recipe), recipe.parent)
        assert done.returncode == 0, done.stderr
    expected, came = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert came == pytest.approx(expected, rel=2e-3)
    names = set().union(*read_metrics(tmp_path / "cached/run"))
    assert "time/cache" in names
    assert "time/teacher/expert" not in names
    assert (tmp_path / f"cached/run/pictures/step-{STEPS:08d}.png").is_file()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"seed": 5}}, r"written by another recipe \(data.seed: 0 there, 5 here\)"),
        (
            {"data": {"augmentation": {"scale": [0.1, 1.0]}}},
            r"data.augmentation.scale: \[0.5, 1.0\] there, \[0.1, 1.0\] here",
        ),
        (
            {"teachers": {"expert": {"kind": "timm", "model": "test_vit2", "weights": "none"}}},
            "teachers.expert.model: 'test_vit' there, 'test_vit2' here",
        ),
        (
            {"objective": {"standardisation": "none", "summary": "cosine"}},
            "objective.standardisation: 'phi_s' there, 'none' here",
        ),
        ({"run": {"resolution": 48}}, "has no expert-.*-48x48 .*; it has expert-matched-32x32"),
        (
            {"objective": {"equivariance": {"kind": "shift", "limit": 1}}},
            "equivariance: draws new views",
        ),
        ({"targets": {"placement": {"expert": "offloaded"}}}, "placement: no teacher runs with"),
        (
            {"targets": {"cached": "nowhere"}},
            "nowhere holds no complete cache .*distill.write_targets RECIPE nowhere",
        ),
    ],
)
def test_another_teacher_view_or_size_than_the_caches_is_refused_before_a_run(
    sections: dict[str, Any], message: str, cache: Path, tmp_path: Path
) -> None:
    targets = {"targets": {"cached": str(cache), **sections.get("targets", {})}}
    recipe = recipe_in(tmp_path, cache.parent / "shards", **{**sections, **targets})
    with pytest.raises(RecipeError, match=message):
        preview(load_student_recipe(recipe, []))


def test_a_step_beyond_the_caches_is_told_with_the_image(cache: Path, tmp_path: Path) -> None:
    recipe = recipe_in(
        tmp_path,
        cache.parent / "shards",
        targets={"cached": str(cache)},
        run={"steps": STEPS + 1, "dir": str(tmp_path / "run")},
    )
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 2
    assert "has image 000000.tar/" in done.stderr
    assert "in another view only" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("augmentation", "crops", "seed"), [("none", None, 3), ({}, 2, 0)])
def test_where_crops_repeat_a_cache_of_all_of_them_serves_any_number_of_steps(
    augmentation: Any, crops: int | None, seed: int, cache: Path, tmp_path: Path
) -> None:
    shards = cache.parent / "shards"
    source = {"shards": str(shards), "crops": crops}
    plain = {"data": {"augmentation": augmentation, "sources": [source]}}
    writer = recipe_in(tmp_path / "writer", shards, **plain, run={"steps": 1000})
    write(writer, tmp_path / "cache")
    longer = {"run": {"steps": 2 * STEPS + 1, "seed": seed, "dir": str(tmp_path / "reader/run")}}
    cached = {"targets": {"cached": str(tmp_path / "cache")}}
    reader = recipe_in(tmp_path / "reader", shards, **plain, **longer, **cached)
    done = run(plain_command(reader), tmp_path / "reader")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective={equivariance: {kind: shift, limit: 1}}"], "equivariance: draws new views in"),
        (["objective={standardisation: none}"], "--precision int8: has one scale for all channels"),
        (["targets.cached=x"], "targets.cached: this command writes the cache; remove the key"),
    ],
)
def test_what_no_cache_can_hold_is_not_written(
    arguments: list[str],
    message: str,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_in(tmp_path, cache.parent / "shards")
    with pytest.raises(SystemExit, match="2"):
        write(recipe, tmp_path / "cache", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_something_in_it_is_not_written_to(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(tmp_path, cache.parent / "shards")
    with pytest.raises(SystemExit, match="2"):
        write(recipe, cache)
    assert "is not empty; give another folder, or remove it" in capsys.readouterr().err


@pytest.mark.parametrize("asked_at", [0, 3])
def test_a_cache_that_was_stopped_goes_on_and_is_the_same(
    asked_at: int,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No target is computed twice; a stop in the first step keeps nothing."""
    recipe, folder = recipe_in(tmp_path, cache.parent / "shards"), tmp_path / "cache"
    add, calls = cached_targets._add, []

    def asking(*arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) == asked_at + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        add(*arguments)

    monkeypatch.setattr(cached_targets, "_add", asking)
    with pytest.raises(SystemExit, match="0"):
        write(recipe, folder, "--precision", "fp16")
    assert len(calls) == asked_at + 1
    assert "stopped on request" in capsys.readouterr().err
    assert not (folder / "cache.json").exists()
    with pytest.raises(SystemExit, match="2"):
        write(recipe, folder, "--precision", "fp16", "run.seed=5")
    assert "the unfinished cache of another recipe (data.seed: 0" in capsys.readouterr().err

    write(recipe, folder, "--precision", "fp16")
    assert not (folder / "unfinished.json").exists()
    whole, parts = TargetCache(cache), TargetCache(folder)
    assert parts.facts == whole.facts
    for group, places in stored_views(cache).items():
        views = list(places)
        assert list(stored_views(folder)[group]) == views
        if views:
            one, two = (c.read(group, views, torch.device("cpu")) for c in (whole, parts))
            assert torch.equal(one.spatial, two.spatial)


def test_writing_a_cache_arms_no_watchdog(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits of the report: a second of statistics, then as long as it takes."""
    armed: list[float] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds)
    )
    recipe = recipe_in(tmp_path, cache.parent / "shards")
    write(recipe, tmp_path / "cache", "run.watchdog_s=4", "targets.statistics_images=16")
    assert armed == []


def test_a_teacher_whose_weights_have_moved_is_the_same_teacher(
    cache: Path, tmp_path: Path
) -> None:
    shards = cache.parent / "shards"
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / f"{name}.pt")

    def recipe(name: str, **targets: str) -> Path:
        entry = {"kind": "timm", "model": "test_vit", "weights": str(tmp_path / f"{name}.pt")}
        teachers = {"expert": {**entry, "resolution": [32, 32]}}
        return recipe_in(tmp_path / name, shards, teachers=teachers, targets=targets)

    write(recipe("a"), tmp_path / "cache")
    cached = {"cached": str(tmp_path / "cache")}
    preview(load_student_recipe(recipe("b", **cached), ["data.decoder=pil"]))
    message = (
        r"written by another recipe \(teachers\.expert\.weights: .*a.pt' there, .*other.pt' here"
    )
    with pytest.raises(RecipeError, match=message):
        preview(load_student_recipe(recipe("other", **cached), []))
