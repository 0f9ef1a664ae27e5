"""A suite that is asked to stop: what is measured is kept, and the same command goes on."""

import os
import signal
import time
from pathlib import Path

import pytest

from distill import evaluate
from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.evaluation.suite import read_results
from distill.runtime.config import dump_yaml
from teachers.teacher import Teacher

CALLS: list[int] = []


class Asked(Benchmark):
    """Asks its process to stop when it measures a second time, once."""

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        CALLS.append(seed)
        if len(CALLS) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return Measurement({"score": float(seed)}, {})


def test_a_suite_ends_with_0_in_the_middle_of_a_benchmark_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    CALLS.clear()
    tree = {
        "task": "benchmarks",
        "dir": str(tmp_path / "results"),
        "models": {"colours": {"kind": "pixels"}},
        "benchmarks": {"asked": {"kind": f"{__name__}:Asked"}},
        "seeds": [3, 5, 7],
    }
    (tmp_path / "suite.yaml").write_text(dump_yaml(tree))
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "suite.yaml")])
    with pytest.raises(SystemExit, match="0"):
        evaluate.main()
    assert "stopped on request" in capsys.readouterr().err
    assert [row["seed"] for row in read_results(tmp_path / "results")] == [3]
    evaluate.main()
    assert CALLS == [3, 5, 5, 7]
    assert [row["seed"] for row in read_results(tmp_path / "results")] == [3, 5, 7]
