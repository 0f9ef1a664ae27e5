"""Inference and loading time of an exported student, compared with a timm ViT of as many tokens.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_student

A ViT-B/16 of 224 px with random weights: the student has two class tokens and four registers, the
timm model one and five. Both take turns in one process; the ratio of process CPU time, which other
processes disturb less than wall time, is the median over rounds. Loading is timed by wall time in
fresh processes, once with all imports and once after those of torch and timm; the smallest of a
few, with the file in the page cache.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import student
from student.config import HeadConfig, StudentConfig
from student.model import Student
from student.storage import save_student
from teachers.features import FeatureSpec
from tests.benchmarks.figure import Figure
from tests.benchmarks.inference import speed_ratio

SIDE, BATCH = 224, 8
TIMED_LOAD = """
import sys, time
if sys.argv[2] == "warm":
    import teachers.features, timm.models.vision_transformer
start = time.perf_counter()
import student
student.load(sys.argv[1])
print(time.perf_counter() - start)
"""


def write(path: Path) -> None:
    """The backbone of a student of two teachers, as `distill.export --no-heads` writes it."""
    spec = FeatureSpec(summary_dim=768, spatial_dim=768, patch_size=16, resolution=(SIDE, SIDE))
    size = {"size": "base", "max_resolution": 512, "final_norm": True}
    config = StudentConfig(**size, head=HeadConfig(only=()))
    made = Student(config, {"first": spec, "second": spec})
    save_student(path, made.config, made.targets, made.state_dict(), {})


def exported(path: Path) -> Callable[[Tensor], Tensor]:
    """The student, called as a user does."""
    model = student.load(path)
    return lambda images: model(images).backbone.spatial


def timm_vit() -> Callable[[Tensor], Tensor]:
    """timm's model of the same shape and number of tokens, on normalised images."""
    import timm  # after the package `teachers`, which repairs torchvision

    model = timm.create_model("vit_base_patch16_224", num_classes=0, reg_tokens=5).eval()
    return model.forward_features


def load_seconds(path: Path, how: str, tries: int = 3) -> float:
    """The shortest time to import and load, in processes of their own."""
    command = [sys.executable, "-c", TIMED_LOAD, str(path), how]
    outputs = [
        subprocess.run(command, capture_output=True, check=True).stdout for _ in range(tries)
    ]
    return min(map(float, outputs))


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.safetensors"
        write(path)
        print(f"load with all imports: {load_seconds(path, 'cold'):.2f} s")
        loading = load_seconds(path, "warm")
        variants = {"student": exported(path), "timm": timm_vit()}
        ratio = speed_ratio(variants, torch.rand(BATCH, 3, SIDE, SIDE), options.rounds)
    return [
        Figure("student inference: images/s over the timm ViT", ratio, 0.97, False),
        Figure("student: seconds to load a ViT-B", loading, 2.0, True),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
