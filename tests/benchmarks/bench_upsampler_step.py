"""CPU time of an upsampler's training step, compared with the public schedule on the same modules.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_upsampler_step

FeatSharp 4x for a ViT-S/16 with random weights at 128 px, two images and five views, in float32 on
one thread: forward and backward pass, without the optimizer, which is the same. The public schedule
warps each view at the full size and then shrinks it, encodes the views one by one, and runs a
backward pass through the whole upsampler for each view (`retain_graph`). Both take turns in one
process; the ratio of process CPU time is the median over rounds. First the script checks that both
give the same loss and gradients for the same views.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill.runtime.config import validate
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.tasks.upsampler_task import MultiView, build_multi_view
from teachers.build import build_teacher
from teachers.phi_s import FeatureStatistics, fit_phi_s
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize
from teachers.upsamplers.views import sample_homographies, warp, warp_images
from tests.benchmarks.figure import Figure

SIDE, FACTOR, BATCH = 128, 4, 2
Warp = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def build() -> tuple[MultiView, Teacher, Tensor, Tensor]:
    """The module of a recipe, its teacher, images and views."""
    entry = {"kind": "timm", "model": "vit_small_patch16_224", "weights": "none"}
    tree = {
        "task": "upsampler",
        "run": {"dir": str(Path("unused")), "steps": 10, "batch_size": BATCH},
        "data": {"sources": [{"shards": "unused"}]},
        "teacher": entry | {"resolution": [SIDE, SIDE]},
        "upsampler": {"kind": "featsharp", "inputs": ["jbu", "tiles"], "factor": FACTOR},
        "schedule": {"warmup_steps": 0},
    }
    recipe = validate(UpsamplerRecipe, tree, "workload")
    teacher = build_teacher(recipe.teacher)
    sums = FeatureStatistics.zeros(teacher.spec.spatial_dim)
    sums.update(torch.randn(2 * teacher.spec.spatial_dim, teacher.spec.spatial_dim))
    multi_view = build_multi_view(recipe, teacher, fit_phi_s(sums))
    images = torch.rand(BATCH, 3, FACTOR * SIDE, FACTOR * SIDE)
    grid = tuple(FACTOR * cells for cells in teacher.spec.grid(SIDE, SIDE))
    views = sample_homographies(recipe.views, BATCH, grid, torch.Generator().manual_seed(0))
    return multi_view, teacher, images, views


def ours(multi_view: MultiView, images: Tensor, views: Tensor) -> Tensor:
    """One backward pass, from the sum over views."""
    total: Tensor = multi_view(images, views).total
    total.backward()
    return total.detach()


def shrunk_after(images: Tensor, views: Tensor, size: tuple[int, int]) -> Tensor:
    """Warps at the full size, then shrinks to the encoder's."""
    full = (images.shape[-2], images.shape[-1])
    return resize(warp(images, views.flatten(0, 1), full), size)


def public(
    multi_view: MultiView,
    teacher: Teacher,
    images: Tensor,
    views: Tensor,
    warped: Warp = shrunk_after,
) -> Tensor:
    """A backward pass for each view."""
    upsampler = multi_view.upsampler
    low, high = upsampler.standardised(images, teacher)
    total, count = torch.zeros(()), views.shape[1]
    for number in range(count):
        view = views[:, number : number + 1]
        seen = teacher(warped(images, view, teacher.spec.resolution)).spatial
        terms = multi_view.consistency(
            high.spatial,
            upsampler.standardise(seen)[:, None],
            view,
            low=low.spatial,
            images=images,
            generator=torch.Generator().manual_seed(0),
        )
        loss = terms.total / count
        loss.backward(retain_graph=number + 1 < count)
        total += loss.detach()
    return total


def agree(multi_view: MultiView, teacher: Teacher, images: Tensor, views: Tensor) -> None:
    """Checks that both give the same loss and gradients for the same views."""
    parameters = [p for p in multi_view.parameters() if p.requires_grad]
    results = []
    for call in (
        lambda: ours(multi_view, images, views),
        lambda: public(multi_view, teacher, images, views, warp_images),
    ):
        loss = call()
        zero = torch.zeros(())
        results.append((loss, [zero if p.grad is None else p.grad.clone() for p in parameters]))
        multi_view.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-9


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    multi_view, teacher, images, views = build()
    agree(multi_view, teacher, images, views)
    seconds: dict[str, list[float]] = {"ours": [], "public": []}
    for number in range(chosen.rounds + 1):
        for name, times in seconds.items():
            start = time.process_time()
            if name == "ours":
                ours(multi_view, images, views)
            else:
                public(multi_view, teacher, images, views)
            if number:
                times.append(time.process_time() - start)
            multi_view.zero_grad()
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times):.2f} CPU s a step")
    pairs = zip(seconds["public"], seconds["ours"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return [Figure("upsampler step: times faster than the public schedule", ratio, 2.0, False)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
