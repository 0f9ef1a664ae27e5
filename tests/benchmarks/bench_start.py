"""Time from the launch of a run to its first optimizer step.

    python -m tests.benchmarks.bench_start

The workload of `workload.py` under the `deepspeed` launcher: imports, the index of the shards, the
teachers, their statistics over one batch of images, the engine, one step. The median of three
runs, after one that warms the page cache. Target: under 10 s.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from distill.runtime.tracking import read_metrics
from tests.benchmarks.figure import Figure
from tests.benchmarks.workload import launch, write_workload

RUNS = 3


class Start(NamedTuple):
    """Seconds since the launch.

    At `running` the rank has imported everything, read the recipe and opened the run's folder; at
    `fitted` it has built the teachers and written their statistics, which a later start reads; at
    `first_step` it has written the metrics of the first step. `cpu` is not a point in time, but the
    CPU seconds of all processes until the end of the run, which also saves a checkpoint.
    """

    running: float
    fitted: float
    first_step: float
    cpu: float


def measure(folder: Path) -> Start:
    """Launches a run of one step, and reads the times at which it wrote its files."""
    path = write_workload(folder, steps=1)
    before = os.times()
    started, _ = launch(path, num_ranks=1)
    after, run = os.times(), folder / "run"
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    assert [line["step"] for line in read_metrics(run)] == [1]
    # Each is written once.
    files = ("versions.json", "statistics/second.safetensors", "metrics.jsonl")
    moments = [(run / name).stat().st_mtime for name in files]
    return Start(*(moment - started for moment in moments), cpu)


def main() -> list[Figure]:
    """Measures and prints; returns the figure."""
    starts = []
    for _ in range(RUNS + 1):
        with tempfile.TemporaryDirectory() as folder:
            starts.append(measure(Path(folder)))
        print(
            "launch to run folder {:.2f} s, to statistics {:.2f} s, to first step {:.2f} s; "
            "{:.2f} CPU s in total".format(*starts[-1])
        )
    median = statistics.median(start.first_step for start in starts[1:])
    return [Figure("start: seconds from the launch to the first step", median, 10, True)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
