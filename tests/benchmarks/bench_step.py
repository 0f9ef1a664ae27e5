"""Time and memory of a training step, compared with a bare PyTorch loop that computes the same.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_step

Both take turns in one process; the ratio of process CPU time, which other processes disturb less
than wall time, is the median over rounds. Peak memory is measured in a process for each. Targets:
at most 1.05 times the CPU time of the bare loop, and 1.10 times its peak memory.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.figure import Figure
from tests.benchmarks.one_step import Arm, Step, as_they_are, bare_step, cpu_ratio, our_step
from tests.benchmarks.workload import BATCH, SIDE, TEACHER, recipe

ARM = Arm(BATCH, SIDE, (as_they_are, as_they_are))


def steps() -> dict[str, Callable[[], Step]]:
    """Builders of both."""
    return {
        "ours": lambda: our_step(recipe(Path("unused"), steps=1)),
        "bare": lambda: bare_step(TEACHER, [ARM]),
    }


def peak_memory(name: str) -> float:
    """GB that three steps of `ours` or `bare` take in a process of their own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--peak", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = float(done.stdout.split()[-1])
    print(f"{name}: peak memory {peak:.3f} GB")
    return peak


def high_water() -> float:
    """GB of the largest resident set of this process.

    The value of getrusage does not serve: a child process inherits that of its parent.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=["ours", "bare"], help="print only its peak memory")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if chosen.peak:
        step = steps()[chosen.peak]()
        for _ in range(3):
            step([ARM.batch()])
        print(high_water())
        return []
    both = {name: build() for name, build in steps().items()}
    ratio = cpu_ratio(both, [ARM.batch()], chosen.rounds)
    memory = peak_memory("ours") / peak_memory("bare")
    return [
        Figure("step: CPU time over a bare PyTorch loop", ratio, 1.05, True),
        Figure("step: peak memory over a bare PyTorch loop", memory, 1.10, True),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
