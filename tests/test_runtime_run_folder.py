"""What may differ when a run goes on in its folder."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import open_run_folder

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


def test_an_arms_batch_may_not(tmp_path: Path) -> None:
    open_run_folder(tmp_path, RECIPE)
    other = deepcopy(RECIPE)
    other["arms"]["low"]["batch_size"] = 16
    with pytest.raises(RecipeError, match=r"arms.low.batch_size: 8 there, 16 here"):
        open_run_folder(tmp_path, other)
