"""How long a run takes from its launch to its first optimiser step.

    python -m tests.benchmarks.bench_start

The workload of `workload.py` under the `deepspeed` launcher: imports, the index of the shards, the
teachers, their statistics over one batch of images, the engine, one step. The median of three
runs, after one that finds the disk cold. Target: under 10 s.
"""

import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from distill.tracking import read_metrics
from tests.benchmarks.figure import Figure
from tests.benchmarks.workload import launch, write_workload

RUNS = 3


class Start(NamedTuple):
    """Seconds since the launch.

    `running` is when the rank has imported everything, read the recipe and opened the run's folder;
    `first_step` is when the first step's metrics were written.
    """

    running: float
    first_step: float


def measure(folder: Path) -> Start:
    """Launches a run of one step and reads off its files when they were written."""
    path = write_workload(folder, steps=1)
    started, _ = launch(path, num_ranks=1)
    run = folder / "run"
    assert [line["step"] for line in read_metrics(run)] == [1]
    # Each is written once, at its moment, and never again.
    moments = [(run / name).stat().st_mtime for name in ("versions.json", "metrics.jsonl")]
    return Start(*(moment - started for moment in moments))


def main() -> list[Figure]:
    """Measures and prints; returns the figure."""
    starts = []
    for _ in range(RUNS + 1):
        with tempfile.TemporaryDirectory() as folder:
            starts.append(measure(Path(folder)))
        print("launch to run folder {:.2f} s, to first step {:.2f} s".format(*starts[-1]))
    median = statistics.median(start.first_step for start in starts[1:])
    return [Figure("start: seconds from the launch to the first step", median, 10, True)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
