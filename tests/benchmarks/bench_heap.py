"""CPU time of a CNN teacher with and without `distill.runtime.heap`, in one process.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_heap

EfficientNet-Lite2 with random weights on 32 images of 256 px. Malloc's two settings take turns; the
ratio of CPU time, the kernel's included, is the median over rounds. Target: at most 0.9.
"""

import argparse
import ctypes
import statistics
import time

import torch

from distill.runtime.heap import keep_freed_memory
from teachers.build import build_teacher, parse_teacher
from tests.benchmarks.figure import Figure

MODEL = {"kind": "timm", "model": "tf_efficientnet_lite2", "weights": "none"}
# mallopt's parameters and where glibc's own adaptation leaves them: TRIM_THRESHOLD,
# MMAP_THRESHOLD, MMAP_MAX.
DEFAULTS = {-1: 64 << 20, -3: 32 << 20, -4: 65536}


def return_freed_memory() -> None:
    """Sets malloc to what it does by default."""
    for parameter, value in DEFAULTS.items():
        ctypes.CDLL(None).mallopt(parameter, value)
    ctypes.CDLL(None).malloc_trim(0)


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    teacher = build_teacher(parse_teacher(MODEL), device="cpu")
    images = torch.rand(32, 3, 256, 256)
    settings = {"returned": return_freed_memory, "kept": keep_freed_memory}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(options.rounds + 1):  # the first only warms up
        for name, setting in sorted(settings.items(), reverse=bool(number % 2)):
            setting()
            with torch.no_grad():
                teacher(images)
                start = time.process_time()
                teacher(images)
            if number:
                seconds[name].append(time.process_time() - start)
    for name, each in seconds.items():
        print(f"freed memory {name}: {1000 * statistics.median(each) / 32:.1f} CPU ms an image")
    ratios = [k / r for k, r in zip(seconds["kept"], seconds["returned"], strict=True)]
    name = "a CNN teacher with freed memory kept: CPU time"
    return [Figure(name, statistics.median(ratios), 0.9, True)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
