"""The tables and lines of a plan: models of an arm, memory of a rank, time of the run."""

from collections.abc import Sequence

import torch

from distill.display.tables import Cell, Table
from distill.planning import machine
from distill.planning.machine import GB, LINK_SHARE, MEMORY_SHARE, Speed
from distill.planning.memory import Memory
from distill.planning.meter import Trace
from distill.planning.scaling import ArmCost, Scaled
from distill.planning.step import Arm, ModelRow

_MB = 1e6


def arm_table(cost: ArmCost, rows: Sequence[ModelRow], speed: Speed) -> Table:
    """The models that the images of an arm go through, one line each."""
    arm, trace = cost.arm, cost.trace
    whole = speed.seconds(trace.flops())
    lines = []
    for row in rows:
        usage, flops = trace.components[row.component], trace.flops(row.component)
        share = speed.seconds(flops) / whole
        held = usage.held if row.trained else usage.peak
        figures = [
            _short(row.parameters / 1e6),
            _short(sum(flops.values()) / 1e9),
            _short(flops[torch.float32] / 1e9),
            f"{share:.0%}",
            _short(held / trace.images / _MB),
            f"{row.passes:.3g}",
            row.shapes,
        ]
        lines.append((row.component, [Cell(figure) for figure in figures]))
    h, w = arm.resolution
    total = sum(trace.flops().values()) / 1e12
    return Table(
        f"{arm.name}: {arm.batch_size} images of {h} x {w} px {_steps(arm.share)}, "
        f"{_short(total)} TFLOP an image",
        ("part", "M weights", "GFLOP", "in fp32", "time", "MB", "passes", "input -> map"),
        lines,
        "GFLOP and MB are for one image. What is trained: forward and backward pass, and memory "
        "held for the latter. Teachers: forward pass, and the most memory while it runs.",
    )


def memory_table(steps: Sequence[Scaled], arms: Sequence[Arm]) -> Table:
    """The peak memory of a rank, a column for each number of GPUs; `arms` are those of a step."""
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
        "Last lines: images of a micro-batch, and the most that would fit.",
    )


def time_table(steps: Sequence[Scaled], batch_size: float, gpu: str) -> Table:
    """The time of a step, of `batch_size` images on average, and of the run, by number of GPUs."""
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
    """What the other choice of `student.activation_checkpointing` would change.

    `checkpointing` is that choice, and `other` the trace of the arm's micro-batch with it.
    """
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
    """The assumptions behind the figures, one sentence each."""
    gpu, arithmetic = speed.gpu, "float32" if speed.precision == "fp32" else "TF32"
    reading = f"{workers} workers a rank" if workers else "no workers: reading adds to the step"
    return [
        f"{gpu.half:g} TFLOP/s in bf16 and {speed.single:g} of float32 products in {arithmetic} "
        f"({gpu.source}), {speed.utilisation:.0%} of each; heads, losses and PHI-S are float32.",
        f"{MEMORY_SHARE:.0%} of {gpu.memory:g} GB is available.",
        f"Ring collectives over {gpu.link:g} GB/s within a node of {gpu.node}, "
        f"{gpu.network:g} GB/s a GPU between nodes, at {LINK_SHARE:.0%}; no overlap with "
        "computation, no latency.",
        f"JPEGs with {machine.SOURCE_PIXELS} times the student's pixels, read at "
        f"{machine.PIXELS_PER_S / 1e6:g} Mpx/s a worker, at most {machine.IMAGES_PER_S:g} "
        f"images/s; {reading}.",
        "Not counted: power iteration, weight noise, shifts and warps, the arithmetic of optimizer "
        "and average, checkpoints, pictures, evaluation, ranks waiting for each other.",
    ]


def _steps(share: float) -> str:
    return "a step" if share == 1 else f"in {share:.0%} of the steps"


def _short(value: float) -> str:
    """About three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
