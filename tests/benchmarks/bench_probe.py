"""CPU time of a probe's step on cached features, compared with encoding at every step.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_probe

The linear depth probe on a ViT-S/16 at 224 px, on images in memory. The online mode encodes eight
of them at each step; the cached mode reads features that were encoded once, which is not timed. The
ratio of process CPU time is the median over rounds. Target: the online step takes at least 20 times
the cached one.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.benchmarks.dense.depth import BinnedDepth, sig_loss
from distill.benchmarks.dense.heads import LinearHead
from distill.benchmarks.dense.probe_training import ProbeConfig, probe_batches, train_heads
from teachers.build import build_teacher, parse_teacher
from tests.benchmarks.figure import Figure

BATCH, SIDE, STRIDE, COUNT, DIM = 8, 224, 4, 32, 384


def seconds_a_step(mode: str, steps: int, folder: Path) -> float:
    """Process CPU time of a step, without encoding the cache."""
    teacher = build_teacher(
        parse_teacher({"kind": "timm", "model": "vit_small_patch16_224", "weights": "none"})
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(COUNT, 3, SIDE, SIDE, generator=generator)
    truth = 1 + 8 * torch.rand(COUNT, 1, SIDE // STRIDE, SIDE // STRIDE, generator=generator)

    def sample(number: int, _: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return images[number], truth[number]

    def encode(pixels: Tensor) -> tuple[Tensor, ...]:
        return (teacher(pixels).spatial,)

    def loss(depth: Tensor, wanted: Tensor, step: int) -> Tensor:
        dense = nn.functional.interpolate(depth, SIDE // STRIDE, mode="bilinear")
        return sig_loss(dense, wanted, wanted > 0, step)

    def head() -> nn.Module:
        return BinnedDepth(LinearHead(DIM, 256), 256, (0.001, 10.0))

    config = ProbeConfig.model_validate(
        {"steps": steps, "batch_size": BATCH, "lr": 1e-3, "mode": mode}
    )
    batches = probe_batches(config, sample, encode, COUNT, 0, folder)
    start = time.process_time()
    train_heads(head, config, batches, loss, COUNT, 0)
    return (time.process_time() - start) / steps


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.rounds + 1):
            online = seconds_a_step("online", 4, Path(folder))
            cached = seconds_a_step("cached", 80, Path(folder))
            print(f"online {online * 1e3:.0f} ms, cached {cached * 1e3:.1f} ms of CPU a step")
            if number:  # the first round only warms up
                ratios.append(online / cached)
    return [Figure("probe: online step over cached step", statistics.median(ratios), 20, False)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
