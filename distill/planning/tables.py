"""A plan for a terminal: what an arm is made of, what a rank holds, how long the run takes."""

from collections.abc import Sequence

import torch

from distill.display.tables import Cell, Table
from distill.planning.machine import (
    GB,
    IMAGES_PER_S,
    LINK_SHARE,
    MEMORY_SHARE,
    PIXELS_PER_S,
    SOURCE_PIXELS,
    Speed,
)
from distill.planning.memory import Memory
from distill.planning.scaling import ArmCost, Scaled
from distill.planning.step import Arm, Row, Trace

_MB = 1e6


def arm_table(cost: ArmCost, rows: Sequence[Row], speed: Speed) -> Table:
    """The models that an arm's images go through, a line each.

    Args:
        cost: of the arm.
        rows: its models.
        speed: gives the shares of time.
    """
    arm, trace = cost.arm, cost.trace
    whole = speed.seconds(trace.flops())
    lines = []
    for row in rows:
        part, flops = trace.parts[row.part], trace.flops(row.part)
        share = speed.seconds(flops) / whole
        held = part.held if row.trained else part.peak
        figures = [
            _short(row.parameters / 1e6),
            _short(sum(flops.values()) / 1e9),
            _short(flops[torch.float32] / 1e9),
            f"{share:.0%}",
            _short(held / trace.images / _MB),
            f"{row.passes:.3g}",
            row.seen,
        ]
        lines.append((row.part, [Cell(figure) for figure in figures]))
    h, w = arm.resolution
    total = sum(trace.flops().values()) / 1e12
    return Table(
        f"{arm.name}: {arm.batch_size} images of {h} x {w} px {_steps(arm.share)}, "
        f"{_short(total)} TFLOP an image",
        (
            *("part", "M weights", "GFLOP", "in fp32", "time", "MB", "passes"),
            "input -> map",
        ),
        lines,
        "GFLOP and MB are an image's: of what is trained forward and backward, and kept for the "
        "latter; of teachers forward, and at most while they run.",
    )


def memory_table(steps: Sequence[Scaled], arms: Sequence[Arm]) -> Table:
    """What a rank holds at its fullest, a column for each number of GPUs.

    Args:
        steps: on these.
        arms: whose micro-batches they have, and what would fit.
    """
    lines = [
        (name, [Cell(_short(getattr(step.memory, name) / GB)) for step in steps])
        for name in Memory._fields
    ]
    lines.append(("total", [Cell(_short(step.memory.total / GB), best=True) for step in steps]))
    for number, arm in enumerate(arms):
        sizes = [f"{step.micro_batches[number]} of {step.largest[number]}" for step in steps]
        lines.append((arm.name, [Cell(size) for size in sizes]))
    return Table(
        "GB of a rank (10^9 bytes)",
        ("", *(_gpus(step.gpus) for step in steps)),
        lines,
        "Below: images of a micro-batch, of as many as fit.",
    )


def time_table(steps: Sequence[Scaled], batch_size: float, gpu: str) -> Table:
    """How fast the run is, a line for each number of GPUs."""
    first = steps[0]
    lines = []
    for step in steps:
        speed_up = first.step * first.gpus / (step.step * step.gpus)
        figures = [
            f"{step.accumulation:.3g}",
            _short(1e3 * step.compute),
            _short(1e3 * step.communication),
            _short(1e3 * step.data),
            _short(1e3 * step.step),
            _short(batch_size / step.step),
            f"{speed_up:.0%}",
            _short(step.hours),
            step.limit,
        ]
        lines.append((_gpus(step.gpus), [Cell(figure) for figure in figures]))
    return Table(
        f"Time on {gpu}",
        (
            *("", "passes", "compute ms", "links ms", "reading ms", "step ms", "images/s"),
            *("efficiency", "hours", "limit"),
        ),
        lines,
    )


def checkpointing_line(checkpointing: bool, cost: ArmCost, other: Trace) -> str:
    """What the other choice of activation checkpointing would do to an arm."""
    peaks, flops = (
        [_short(trace.peak / GB) for trace in (other, cost.trace)],
        [_short(sum(trace.flops().values()) / 1e12) for trace in (other, cost.trace)],
    )
    return (
        f"student.activation_checkpointing={str(checkpointing).lower()}: {cost.arm.name} takes "
        f"{peaks[0]} GB beyond weights for {other.images} images instead of {peaks[1]}, and "
        f"{flops[0]} TFLOP an image instead of {flops[1]}"
    )


def assumptions(speed: Speed, workers: int) -> list[str]:
    """What the figures take for granted, a sentence each."""
    gpu, thin = speed.gpu, "float32" if speed.precision == "fp32" else "TF32"
    reading = f"{workers} workers a rank" if workers else "no workers: reading adds to the step"
    return [
        f"{gpu.half:g} TFLOP/s in bf16 and {speed.single:g} of float32 products in {thin} "
        f"({gpu.source}), {speed.utilisation:.0%} of each; heads, losses and PHI-S are float32.",
        f"{MEMORY_SHARE:.0%} of {gpu.memory:g} GB is ours.",
        f"Rings over {gpu.link:g} GB/s within a node of {gpu.node}, {gpu.network:g} GB/s a GPU "
        f"between nodes, at {LINK_SHARE:.0%}; not overlapped with computing, no latency.",
        f"Photographs of {SOURCE_PIXELS} times the student's pixels, {PIXELS_PER_S / 1e6:g} Mpx/s "
        f"a worker, at most {IMAGES_PER_S:g} images/s; {reading}.",
        "Not counted: power iteration, noise on weights, shifts and warps, arithmetic of optimiser "
        "and average, checkpoints, pictures, evaluation, waiting.",
    ]


def _steps(share: float) -> str:
    return "a step" if share == 1 else f"in {share:.0%} of the steps"


def _short(value: float) -> str:
    """Three digits or so."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
