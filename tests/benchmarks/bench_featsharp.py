"""CPU time of FeatSharp 4x, compared with the 17 passes of its encoder and with its own FLOPs.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_featsharp

A ViT-B/16 and a ViT-L/16 with random weights at 128 px, so that 8 x 8 cells become 32 x 32, in
float32 on one thread. The whole forward pass takes turns in one process with a batch of 17 images
through the encoder; the ratio of process CPU time is the median over rounds. If FeatSharp ran at
the encoder's FLOP/s, the ratio would be 1 plus the FLOPs of fusion and JBU over the encoder's. The
figure is the measured ratio over that one.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from teachers.build import build_teacher, parse_teacher
from teachers.teacher import Teacher
from teachers.upsamplers.featsharp import FeatSharp, FeatSharpConfig
from tests.benchmarks.figure import Figure

SIDE, FACTOR = 128, 4
MODELS = {"ViT-B": "vit_base_patch16_224", "ViT-L": "vit_large_patch16_224"}


def build(model: str) -> tuple[FeatSharp, Teacher]:
    """Encoder and upsampler with random weights."""
    entry = {"kind": "timm", "model": model, "weights": "none"}
    teacher = build_teacher(parse_teacher(entry | {"resolution": [SIDE, SIDE]}))
    config = FeatSharpConfig(factor=(FACTOR, FACTOR), inputs=("jbu", "tiles"))
    return FeatSharp(teacher.spec, config).eval().requires_grad_(False), teacher


def encoder_flops(teacher: Teacher, images: Tensor) -> int:
    """FLOPs of the encoder on a batch: matrix products, convolutions and attention.

    Attention by formula, as the counter lacks the attention kernels of the CPU.
    """
    with FlopCounterMode(display=False) as counter:
        teacher(images)
    assert not any("attention" in str(name) for name in counter.get_flop_counts()["Global"])
    h, w = teacher.spec.grid(SIDE, SIDE)
    tokens, blocks = h * w + 1, len(teacher.network.blocks)
    attention = 4 * len(images) * blocks * tokens**2 * teacher.spec.spatial_dim
    return counter.get_total_flops() + attention


def featsharp_flops(featsharp: FeatSharp) -> int:
    """FLOPs that FeatSharp adds for an image, without overheads of the implementation.

    In the fusion: linear layers, and attention with 49 keys a query. In the JBU, at each position
    of each level: the projection, 49 products of keys, and 25 cells of the map.
    """
    h, w = featsharp.spec.grid(SIDE, SIDE)
    fusion, dim = featsharp.fusion, featsharp.spec.spatial_dim
    weights = sum(m.weight.numel() for m in fusion.modules() if isinstance(m, nn.Linear))
    keys = fusion.window**2
    macs = FACTOR**2 * h * w * (weights + 2 * keys * sum(fusion.dims))
    for fh, fw in featsharp.jbu.steps:
        h, w = fh * h, fw * w
        macs += h * w * (3 * 32 + 32 * 32 + 49 * 32 + 25 * dim)
    return 2 * macs


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(size: str, rounds: int) -> Figure:
    """The figure of one encoder."""
    torch.manual_seed(0)
    featsharp, teacher = build(MODELS[size])
    image = torch.rand(1, 3, FACTOR * SIDE, FACTOR * SIDE)
    batch = torch.rand(featsharp.num_forwards, 3, SIDE, SIDE)
    due = 1 + featsharp_flops(featsharp) / encoder_flops(teacher, batch)
    whole, alone = [], []
    for number in range(rounds + 1):
        pair = seconds(lambda: featsharp(image, teacher)), seconds(lambda: teacher(batch))
        if number:
            whole.append(pair[0])
            alone.append(pair[1])
    ratio = statistics.median(a / b for a, b in zip(whole, alone, strict=True))
    print(
        f"FeatSharp 4x, {size}: {statistics.median(whole):.2f} CPU s, its {len(batch)} encoder "
        f"passes {statistics.median(alone):.2f}: {ratio:.3f} of them; {due:.3f} by multiplications"
    )
    name = f"FeatSharp 4x, {size}: time over that of its FLOPs"
    return Figure(name, ratio / due, 1.15, True)


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return [measure(size, chosen.rounds) for size in MODELS]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
