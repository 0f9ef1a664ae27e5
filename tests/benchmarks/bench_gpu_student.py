"""Training a student on a GPU at real sizes: images/s, peak memory, share of the peak FLOP/s.

    python -m tests.benchmarks.bench_gpu_student

The teachers of RADIOv2.5-L except SAM (DFN CLIP ViT-H/14-378, SigLIP SO400M, DINOv2-g with
registers), at 378 px, with random weights, compiled, in bf16; a ViT-L/16 of 432 px, so that all
grids are 27 x 27; 48 images a step, AdamW, ZeRO 1, EMA. The run is started by the `deepspeed`
launcher and reads images from shards. For comparison this process does the bare work: each
teacher's forward pass, the student's forward and backward pass, and an AdamW step. FLOPs are those
of matrix products and attention, by PyTorch's counter. Measures nothing without a GPU.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.runtime.tracking import read_metrics
from distill.tasks.build import build_student, build_teachers
from distill.tasks.student_recipe import load_student_recipe
from student.model import StudentOutput
from teachers.compiled import compile_teacher
from tests.benchmarks.bench_gpu_featsharp import ENCODERS, milliseconds
from tests.benchmarks.figure import Figure
from tests.benchmarks.workload import launch, write_workload

STEPS, WARM_UP, BATCH, SIDE = 16, 6, 48, 432
PEAK = 989e12  # FLOP/s of dense bf16 products: H100 SXM and H200, NVIDIA's datasheet
DINO = {"kind": "timm", "model": "vit_giant_patch14_reg4_dinov2", "resolution": [378, 378]}
SECTIONS = {
    "run": {"resolution": SIDE, "batch_size": BATCH},
    "data": {"workers": 8},
    "teachers": {
        name: entry | {"weights": "none"}
        for name, entry in zip(("clip", "siglip", "dino"), [*ENCODERS.values(), DINO], strict=True)
    },
    "student": {"size": "large", "max_resolution": SIDE, "num_registers": None, "head": {}},
    "targets": {"precision": "bf16", "compile": True, "statistics_images": BATCH},
    "engine": {"precision": "bf16", "zero_stage": 1, "ema_decay": 0.999},
}


def student_step(student: torch.nn.Module, images: Tensor) -> None:
    """Forward and backward pass, with any loss: its cost is negligible."""
    with torch.autocast("cuda", torch.bfloat16):
        output: StudentOutput = student(images)
    maps = [head for each in output.heads.values() for head in each if head is not None]
    torch.stack([each.float().square().mean() for each in maps]).sum().backward()


def flops(call: Callable[[Tensor], object], images: Tensor) -> float:
    """FLOPs of one image."""
    with FlopCounterMode(display=False) as counter:
        call(images)
    return counter.get_total_flops() / len(images)


def bare(path: Path) -> tuple[float, float]:
    """Milliseconds of the bare work of a step, and the FLOPs of an image."""
    recipe = load_student_recipe(path, ["targets.compile=false"])
    teachers = build_teachers(recipe)
    student = build_student(recipe, teachers).cuda().train()
    wide, narrow = (torch.rand(BATCH, 3, side, side, device="cuda") for side in (SIDE, 378))
    each = sum(flops(teacher, narrow[:2]) for teacher in teachers.values())
    each += flops(lambda images: student_step(student, images), wide[:2])
    for teacher in teachers.values():
        compile_teacher(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)

    def work() -> None:
        for teacher in teachers.values():
            teacher(narrow)
        student_step(student, wide)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = [milliseconds(work) for _ in range(8)]
    return statistics.median(times[3:]), each


def main() -> list[Figure]:
    """Measures and prints; returns the figures."""
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return []
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        path = write_workload(Path(folder), steps=STEPS, **SECTIONS)
        launch(path, 1)
        lines = read_metrics(Path(folder) / "run")[WARM_UP:]
        speed, waiting, memory = (
            statistics.median(line[key] for line in lines)
            for key in ("images_per_s", "time/data", "peak_memory_gb")
        )
        alone, per_image = bare(path)
    used = speed * per_image / PEAK
    print(
        f"{torch.cuda.get_device_name()}: {speed:.1f} images/s, {memory:.1f} GB, "
        f"{per_image / 1e12:.2f} TFLOP an image, {used:.1%} of the peak, {waiting:.1%} of the time "
        f"waiting for images; the bare work alone {1000 * BATCH / alone:.1f} images/s",
        flush=True,
    )
    return [
        Figure("GPU student: share of the peak FLOPs", used, 0.45, False),
        Figure("GPU student: step over the bare work", 1000 * BATCH / speed / alone, 1.05, True),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
