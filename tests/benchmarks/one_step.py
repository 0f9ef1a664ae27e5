"""One training step in two forms: as `train_student` assembles it, and as a bare PyTorch loop.

Every teacher sees every arm. `cpu_ratio` checks that both forms do the same number of FLOPs.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.optimizer import decay_groups
from distill.runtime import distributed
from distill.runtime.config import validate
from distill.targets.target_statistics import TargetStatistics
from distill.tasks.build import build_student, build_targets, build_teachers
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.student_task import StudentTask
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s
from tests.benchmarks.workload import HIDDEN, LAYERS, SIDE

LR, DECAY, CLIP = 1e-4, 0.02, 1.0
Step = Callable[[Sequence[Tensor]], None]  # of a batch of each arm, uint8 (B, 3, H, W)
Read = Callable[[nn.Module, Tensor], Tensor]  # a teacher's tokens (B, 1 + N, D) of images


class Arm(NamedTuple):
    """The batch of an arm in the bare loop.

    Attributes:
        images: number of images of a step.
        side: height and width in pixels.
        reads: how each teacher encodes them.
    """

    images: int
    side: int
    reads: Sequence[Read]

    def batch(self) -> Tensor:
        """Random pixels."""
        return torch.randint(0, 256, (self.images, 3, self.side, self.side), dtype=torch.uint8)


def as_they_are(teacher: Any, images: Tensor) -> Tensor:
    """The images at the student's size."""
    tokens: Tensor = teacher.forward_features(images)
    return tokens


def shrunk(teacher: Any, images: Tensor) -> Tensor:
    """The images at the teacher's size."""
    return as_they_are(
        teacher, F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    )


def in_tiles(teacher: Any, images: Tensor) -> Tensor:
    """The class token of the whole image, and the patches of four tiles."""
    tiles = rearrange(images, "b c (y h) (x w) -> (b y x) c h w", h=SIDE, w=SIDE)
    whole = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    tokens = as_they_are(teacher, torch.cat([whole, tiles]))
    shape = {"y": images.shape[2] // SIDE, "x": images.shape[3] // SIDE, "h": SIDE // 16}
    stitched = "(b y x) (h w) d -> b (y h x w) d"
    patches = rearrange(tokens[len(images) :, 1:], stitched, **shape)
    return torch.cat([tokens[: len(images), :1], patches], 1)


def our_step(tree: Mapping[str, Any]) -> Step:
    """The engine, the task and the targets, as `train_student` assembles them."""
    distributed.connect(600, Path())  # a single process writes nothing
    recipe = validate(StudentRecipe, tree, "workload")
    teachers = build_teachers(recipe)
    targets = build_targets(recipe, teachers)
    for name, teacher in teachers.items():
        targets.statistics.of[name] = TargetStatistics(
            _phi_s(teacher.spec.spatial_dim), torch.ones(())
        )
    student = build_student(recipe, teachers)
    groups = decay_groups(student, recipe.optimizer, student.no_weight_decay())
    micro_batches = recipe.step_plan(1).micro_batches(0, 0)
    engine = DeepSpeedEngine(
        student, recipe.engine, recipe.optimizer, groups, micro_batch_size=micro_batches[0].images
    )
    task = StudentTask(recipe, student, engine, targets)

    def step(batches: Sequence[Tensor]) -> None:
        for images, micro_batch in zip(batches, micro_batches, strict=True):
            engine.backward(task.loss(images.float() / 255, micro_batch).total)
        engine.step(LR)

    return step


def bare_step(model: str, arms: Sequence[Arm]) -> Step:
    """The same step in plain PyTorch and timm.

    Args:
        model: timm's name of the teachers, ViTs of 224 px with a class token.
        arms: of the step.
    """
    import timm  # after the package `teachers`, which repairs torchvision

    mean, std = (torch.full((3, 1, 1), value) for value in (0.45, 0.27))
    count, free = len(arms[0].reads), {"num_classes": 0, "dynamic_img_size": True}
    teachers = [timm.create_model(model, **free).eval() for _ in range(count)]
    student = timm.create_model(
        "vit_small_patch16_224", reg_tokens=count - 1, global_pool="token", **free
    )
    dim = teachers[0].embed_dim
    heads = nn.ModuleList(
        nn.ModuleList(_head(student.embed_dim, dim) for _ in range(2)) for _ in teachers
    )
    phi_s = _phi_s(dim)
    matrix, centre = phi_s.alpha * phi_s.rotation, phi_s.mean
    parameters = [*student.parameters(), *heads.parameters()]
    decayed, others = ([p for p in parameters if (p.ndim > 1) == matrices] for matrices in (1, 0))
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)
    total = sum(arm.images for arm in arms)

    def loss_of(arm: Arm, images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = [read(t, images) for t, read in zip(teachers, arm.reads, strict=True)]
            targets = [(t[:, 0], (t[:, 1:] - centre) @ matrix.T) for t in tokens]
        ours, loss = student.forward_features(images), torch.zeros(())
        for i, (summary, spatial) in enumerate(targets):
            cosine = F.cosine_similarity(heads[i][0](ours[:, i]), summary)
            predicted = _on_grid_of(spatial, heads[i][1](ours[:, count:]))
            loss = loss + (1 - cosine).mean() + F.mse_loss(predicted, spatial)
        return arm.images / total * loss

    def step(batches: Sequence[Tensor]) -> None:
        for arm, pixels in zip(arms, batches, strict=True):
            loss_of(arm, (pixels.float() / 255 - mean) / std).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cpu_ratio(steps: Mapping[str, Step], batches: Sequence[Tensor], rounds: int) -> float:
    """The ratio of process CPU time, `ours` over `bare`: the median over rounds, after a warm-up.

    Raises:
        RuntimeError: they do not do the same number of FLOPs.
    """
    flops = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step(batches)
        flops[name] = counter.get_total_flops()
    if len(set(flops.values())) > 1:
        raise RuntimeError(f"expected the same FLOPs a step, got {flops}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        # The order alternates, as the second finds another heap than the first.
        for name, step in sorted(steps.items(), reverse=bool(number % 2)):
            start = time.process_time()
            step(batches)
            seconds[name].append(time.process_time() - start)
    for name, each in seconds.items():
        spread = f"[{min(each):.3f}..{max(each):.3f}]"
        print(f"{name}: {statistics.median(each):.3f} CPU s a step {spread}")
    pairs = zip(seconds["ours"], seconds["bare"], strict=True)
    return statistics.median(ours / bare for ours, bare in pairs)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _head(width: int, dim: int) -> nn.Module:
    def mlp(last: int) -> list[nn.Module]:
        return [nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, last)]

    inner = [_Residual(*mlp(HIDDEN)) for _ in range(LAYERS)]
    return nn.Sequential(nn.Linear(width, HIDDEN), *inner, *mlp(dim))


def _on_grid_of(target: Tensor, prediction: Tensor) -> Tensor:
    """Square maps (B, N, D), averaged down to the target's number of cells."""
    if prediction.shape[1] == target.shape[1]:
        return prediction
    side, due = (round(x.shape[1] ** 0.5) for x in (prediction, target))
    maps = rearrange(prediction, "b (h w) d -> b d h w", h=side)
    return F.interpolate(maps, (due, due), mode="bilinear", antialias=True).flatten(2).mT


def _phi_s(dim: int) -> PhiS:
    """PHI-S of random vectors: what it was fitted to does not change its cost."""
    sums = FeatureStatistics.zeros(dim)
    sums.update(torch.randn(2 * dim, dim))
    return fit_phi_s(sums)
