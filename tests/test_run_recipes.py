"""Every recipe takes two optimiser steps in miniature: its options on tiny models and images."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.runtime.config import dump_yaml, load_yaml
from distill.runtime.tracking import read_metrics
from tests.tiny_run import environment, tiny_recipe

pytestmark = pytest.mark.process

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SMALL = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 32]}
# Forked from one process, as what a recipe needs of a minute is its imports.
RUN_ALL = """
import os, sys
from distill import train_student, train_upsampler
import deepspeed, timm
for pair in sys.argv[1:]:
    task, _, path = pair.partition("=")
    child = os.fork()
    if not child:
        sys.argv = [task, path]
        {"student": train_student, "upsampler": train_upsampler}[task].main()
        sys.stderr.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{path} failed")
"""


def sizes(resolution: Any) -> Any:
    """As many sizes as there were, of 32 and 48 px in turn."""
    if not isinstance(resolution, list) or not isinstance(resolution[0], dict):
        return 32
    return [{**size, "size": 32 + 16 * (i % 2)} for i, size in enumerate(resolution)]


def batches(section: dict[str, Any]) -> dict[str, Any]:
    """An arm, or the run without arms: four images, in two passes where it has several."""
    small = {**section, "batch_size": 4}
    if "resolution" in section:
        small["resolution"] = sizes(section["resolution"])
    if "micro_batch_size" in section:
        small["micro_batch_size"] = 2
    return small


def miniature(name: str, folder: Path, shards: Path) -> dict[str, Any]:
    (path,) = [path for path in RECIPES if path.stem == name]
    tree = load_yaml(path)
    tree["run"] = {**tree["run"], "dir": str(folder / "run"), "steps": 2}
    tree["data"] |= {"sources": [{"shards": str(shards)}], "workers": 0}
    tree["targets"] |= {"statistics_images": 8}
    tree["schedule"] = {"warmup_steps": 1}
    tree["tracking"] = {"every": 1, "pictures_every": 2}
    tree.pop("evaluation", None)
    if tree["task"] == "student":
        shrink_student(tree)
    else:
        tree["run"] = {**batches(tree["run"])}
        summary = {k: v for k, v in tree["teacher"].items() if k == "summary"}
        tree["teacher"] = {**SMALL, **summary}
        tree["upsampler"] |= {"num_heads": 4}
    return tree


def shrink_student(tree: dict[str, Any]) -> None:
    for name, teacher in tree["teachers"].items():
        summary = {k: v for k, v in teacher.items() if k == "summary"}
        tree["teachers"][name] = {**SMALL, **summary}
    if "arms" in tree:
        tree["arms"] = {name: batches(arm) for name, arm in tree["arms"].items()}
    else:
        tree["run"] = batches(tree["run"])
    trunk: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "max_resolution": 64}
    left_out = ("size", "depth", "init", "max_resolution", "weights")
    if tree["student"].get("kind") == "timm":
        trunk = {"model": "test_convnext"}
    head = {**tree["student"].get("head", {}), "hidden_dim": 16, "num_layers": 1}
    kept = {k: v for k, v in tree["student"].items() if k not in left_out}
    tree["student"] = {**kept, **trunk, "head": head}
    if "window_augmentation" in tree:
        tree["window_augmentation"] = {"probability": 1.0, "sizes": [1]}
    if "equivariance" in tree.get("objective", {}):
        tree["objective"]["equivariance"] |= {"limit": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each recipe."""
    root = tmp_path_factory.mktemp("recipes")
    tiny_recipe(root)  # writes the shards
    pairs = []
    for path in RECIPES:
        folder = root / path.stem
        folder.mkdir()
        tree = miniature(path.stem, folder, root / "shards")
        (folder / "recipe.yaml").write_text(dump_yaml(tree))
        pairs.append(f"{tree['task']}={folder / 'recipe.yaml'}")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *pairs],
        cwd=root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_every_recipe_takes_two_steps_and_leaves_what_it_trained(name: str, runs: Path) -> None:
    folder = runs / name / "run"
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line[key] > 0 for line in lines for key in ("loss", "grad_norm"))
    trained = "upsampler" if name.startswith("upsampler") else "student"
    assert (folder / f"checkpoints/step-00000002/{trained}.safetensors").is_file()
    assert (folder / "pictures/step-00000002.png").is_file()
