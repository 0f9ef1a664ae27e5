"""The lines of metrics: JSON whatever the numbers are, and none twice."""

import json
import math
from pathlib import Path

import pytest

from distill.runtime.tracking import Tracker, TrackingConfig, read_metrics

NUMBERS = {"loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "images_per_s": 3.0, "time/data": 0.0}


def _tracker(folder: Path, start_step: int = 0) -> Tracker:
    return Tracker(folder, TrackingConfig(), {}, num_steps=9, start_step=start_step, active=True)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Python would write Infinity, which no other reader of JSON takes."""
    with _tracker(tmp_path) as tracker:
        tracker.training_metrics(1, {**NUMBERS, "grad_norm": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, **NUMBERS, "grad_norm": None}


def test_lines_behind_the_step_that_a_run_resumes_from_are_cut(tmp_path: Path) -> None:
    with _tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.training_metrics(step, NUMBERS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    with _tracker(tmp_path, start_step=2) as tracker:
        tracker.training_metrics(3, {**NUMBERS, "loss": 7.0})
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 7)]


def test_a_rank_that_works_longer_than_the_others_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _tracker(tmp_path) as tracker:
        for step, work in ((1, 1.05), (2, 1.4)):
            tracker.training_metrics(
                step, {**NUMBERS, "slowest_rank": 3.0, "slowest_rank_work": work}
            )
    even, uneven = capsys.readouterr().err.splitlines()
    assert even.endswith("data 0%")
    assert uneven.endswith("data 0%  rank 3 works 1.40 x the mean")
