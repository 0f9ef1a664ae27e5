"""Speed of two ranks compared with one, one thread each.

    python -m tests.benchmarks.bench_ranks

The workload of `workload.py`, 8 images a step on each rank, under the `deepspeed` launcher. One and
two ranks take turns; the speed is the median over the steps after the first three. The figure means
little unless two cores are idle, as the ranks wait for each other. Target: two ranks reach at least
1.8 times the images/s of one.
"""

import statistics
import tempfile
from pathlib import Path

from distill.runtime.tracking import read_metrics
from tests.benchmarks.figure import Figure
from tests.benchmarks.workload import BATCH, launch, write_workload

STEPS, WARM_UP, ROUNDS = 8, 3, 2


def measure(folder: Path, num_ranks: int) -> list[float]:
    """Images/s over all ranks, of each step after the warm-up."""
    sections = {"run": {"batch_size": BATCH * num_ranks, "dir": str(folder / f"run-{num_ranks}")}}
    launch(write_workload(folder, steps=STEPS, **sections), num_ranks)
    return [line["images_per_s"] for line in read_metrics(folder / f"run-{num_ranks}")[WARM_UP:]]


def main() -> list[Figure]:
    """Measures and prints; returns the figure."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for num_ranks, each in speeds.items():
            with tempfile.TemporaryDirectory() as folder:
                each += measure(Path(folder), num_ranks)
    one, two = (statistics.median(each) for each in speeds.values())
    print(f"one rank {one:.2f} images/s, two ranks {two:.2f}")
    return [Figure("ranks: images/s of two over one", two / one, 1.8, False)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
