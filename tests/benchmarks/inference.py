"""Inference of two models that take turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


@torch.no_grad()
def speed_ratio(
    variants: Mapping[str, Callable[[Tensor], object]], images: Tensor, rounds: int
) -> float:
    """The first variant's images a second of CPU time over the second's, median over rounds.

    Args:
        variants: two, by name; both medians are printed.
        images: (B, 3, H, W), the input of every run.
        rounds: timed ones, in which the variants take turns in going first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):  # the first only warms up
        for name, run in sorted(variants.items(), reverse=bool(number % 2)):
            start = time.process_time()
            run(images)
            if number:
                seconds[name].append((time.process_time() - start) / len(images))
    for name, each in seconds.items():
        print(f"{name}: {1000 * statistics.median(each):.1f} CPU ms an image")
    first, second = seconds.values()
    return statistics.median(b / a for a, b in zip(first, second, strict=True))
