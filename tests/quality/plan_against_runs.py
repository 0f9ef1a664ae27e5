"""Compares `distill.plan` with real runs: peak memory, FLOPs, and bytes exchanged by ranks.

    OMP_NUM_THREADS=1 python -m tests.quality.plan_against_runs

Each case runs two steps on the CPU, with the engine, teachers, losses and optimiser that the
commands build. Memory is allocated memory as reported by torch's profiler; FLOPs are counted by
torch, with attention as plain matrix products. Prints a line for each case and exits with code 1 if
one is off by more than 10 %.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.optimizer import decay_groups
from distill.objective.views import frame_size
from distill.parametrization.reparametrize import reparametrize
from distill.planning.machine import GPUS, Speed
from distill.planning.run import workload_of
from distill.planning.scaling import Scaling, measure_arms
from distill.planning.student_step import StudentWorkload
from distill.runtime import distributed
from distill.runtime.config import load_yaml, validate
from distill.targets.target_statistics import TargetStatistics
from distill.tasks.build import build_student, build_targets, build_teachers, freeze_student
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.student_task import StudentTask
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.tasks.upsampler_run import base_resolution, build_encoder
from distill.tasks.upsampler_task import UpsamplerTask, build_multi_view, parameter_groups
from distill.training.arms import MicroBatch
from student.model import Student
from student.storage import save_student
from teachers.phi_s import any_phi_s
from tests.benchmarks.workload import recipe as workload_recipe
from tests.ranks import run_on_ranks

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
TOLERANCE = 0.1


class Figures(NamedTuple):
    """Cost of one optimiser step on one rank.

    Attributes:
        memory: peak memory in bytes.
        flops: FLOPs of all its micro-batches.
        exchanged: bytes of the arguments of collectives.
    """

    memory: float
    flops: float
    exchanged: float


class Step(NamedTuple):
    """A task with its engine, and the micro-batches of this rank.

    Attributes:
        task: computes the loss.
        micro_batches: of this rank, in one step.
    """

    task: StudentTask | UpsamplerTask
    micro_batches: list[MicroBatch]

    def run(self, size: tuple[int, int]) -> None:
        """Runs one optimiser step."""
        engine = self.task.engine
        for each in self.micro_batches:
            images = torch.rand(each.images, 3, *size)
            engine.backward(self.task.loss(images, each).total)
        engine.step(1e-4)


def student_step(tree: dict[str, Any]) -> Step:
    """A step as `train_student` builds it, with placeholder statistics."""
    recipe = validate(StudentRecipe, tree, "case")
    micro_batches = recipe.step_plan(distributed.world_size()).micro_batches(distributed.rank(), 0)
    teachers = build_teachers(recipe)
    targets = build_targets(recipe, teachers)
    for name, teacher in teachers.items():
        phi_s = any_phi_s(teacher.spec.spatial_dim)
        targets.statistics.of[name] = TargetStatistics(phi_s, torch.ones(()))
    student = build_student(recipe, teachers)
    freeze_student(student, recipe, teachers)
    reparametrize(student, recipe.reparametrisation)
    groups = decay_groups(student, recipe.optimizer, student.no_weight_decay())
    engine = DeepSpeedEngine(
        student,
        recipe.engine,
        recipe.optimizer,
        groups,
        micro_batch_size=micro_batches[0].images,
        whole_average=recipe.objective.mesa is not None,
    )
    return Step(StudentTask(recipe, student, engine, targets), micro_batches)


def upsampler_step(tree: dict[str, Any]) -> Step:
    """A step as `train_upsampler` builds it, with a placeholder PHI-S."""
    recipe = validate(UpsamplerRecipe, tree, "case")
    teacher, fingerprint = build_encoder(recipe)
    resolution = base_resolution(recipe, teacher.spec)
    plan = recipe.step_plan(resolution, "teacher", distributed.world_size())
    micro_batches = plan.micro_batches(distributed.rank(), 0)
    module = build_multi_view(recipe, teacher, any_phi_s(teacher.spec.spatial_dim))
    groups = parameter_groups(module, recipe)
    size = micro_batches[0].images
    engine = DeepSpeedEngine(module, recipe.engine, recipe.optimizer, groups, micro_batch_size=size)
    return Step(UpsamplerTask(recipe, module, engine, teacher, fingerprint), micro_batches)


def measure(tree: dict[str, Any], size: tuple[int, int]) -> Figures:
    """Measures this rank: memory over two steps of a recipe, the rest over a third."""
    with counted_collectives() as exchanged:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            torch.empty(1)  # the first allocation starts the profiler's record
            step = (student_step if tree["task"] == "student" else upsampler_step)(tree)
            for _ in range(2):
                step.run(size)
        exchanged.clear()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step.run(size)
    return Figures(largest_sum(profiler), counter.get_total_flops(), exchanged.total())


def largest_sum(profiler: Any) -> float:
    """Peak of the bytes allocated by torch."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return float(most)


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Counts the bytes that DeepSpeed passes to collectives on this rank."""
    import torch.distributed as dist

    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            # The first tensor of a gather is its output.
            tensors = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
            counts[name] += tensors[0].numel() * tensors[0].element_size()
            return original(*arguments, **options)

        return patch.object(dist, name, call)

    with counting("all_reduce"), counting("all_gather_into_tensor"):
        yield counts


def predict(tree: dict[str, Any], ranks: int) -> tuple[Figures, tuple[int, int]]:
    """The plan's prediction for a rank, and the size of the images."""
    workload = workload_of(tree, "case")
    costs = measure_arms(workload)
    speed = Speed(GPUS["h100"], "fp32", 1.0)
    scaling = Scaling(workload, costs, speed, device_type="cpu")
    step = scaling.on(ranks)
    (images,), size = step.micro_batches, costs[0].arm.resolution
    flops = sum(costs[0].trace.flops().values()) * images * step.accumulation
    figures = Figures(
        step.memory.total, flops, sum(scaling.sharding.collectives(step.accumulation))
    )
    if isinstance(workload, StudentWorkload):
        objective, patch = workload.recipe.objective, workload.recipe.student.patch_size
        size = frame_size(objective.equivariance, size, patch)
    return figures, size


def student(
    batch: int, micro: int, engine: dict[str, Any], *, sections: Any = None, **options: Any
) -> dict[str, Any]:
    """A ViT-S and two ViT-B teachers, with options of the student and other sections."""
    tree = workload_recipe(
        Path("unused"), steps=1, student=options, engine=engine, **(sections or {})
    )
    tree["run"] |= {"batch_size": batch, "micro_batch_size": micro}
    return tree


def finetuned(folder: Path, batch: int, engine: dict[str, Any], trunk: str) -> dict[str, Any]:
    """Recipe of a student of one teacher that learns another, four images at a time."""
    path = folder / "student.safetensors"
    if not path.exists():
        old = validate(StudentRecipe, student(batch, 4, engine), "case")
        teacher = build_teachers(old, set())["first"]
        model = Student(old.student, {"first": teacher.spec})
        save_student(path, model.config, model.targets, model.state_dict(), {})
    sections = {
        "finetuning": {"trunk": trunk},
        "objective": {"weights": {"first": {"summary": 0, "spatial": 0}}},
    }
    init = {"kind": "student", "path": str(path)}
    return student(batch, 4, engine, sections=sections, init=init, isolated=["second"])


def cases(folder: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Name to recipe and number of ranks; `folder` is for the student to fine-tune."""
    upsampler = load_yaml(RECIPES / "upsampler_siglip_ti.yaml")
    quickstart = load_yaml(RECIPES / "quickstart.yaml")
    average = {"zero_stage": 2, "ema_decay": 0.9}
    mixed = average | {"precision": "bf16"}
    mesa = {"objective": {"mesa": {}, "equivariance": {"kind": "shift"}}}
    spectral = {"reparametrisation": {"spectral": "all"}}
    windows = {"window_augmentation": {"probability": 1.0, "sizes": [7]}}
    return {
        "ViT-S student, fp32": (student(8, 8, average), 1),
        "ViT-S student, bf16": (student(8, 8, average | {"precision": "bf16"}), 1),
        "ViT-S student, checkpointing": (student(8, 8, average, activation_checkpointing=True), 1),
        "ViT-S student, 2 micro-batches": (student(16, 8, average), 1),
        "quickstart, FeatSharp targets": (quickstart, 1),
        "upsampler_siglip_ti": (upsampler, 1),
        "ViT-S student, MESA, shifts": (student(4, 4, mixed, sections=mesa), 1),
        "ViT-S student, spectral norms": (student(4, 4, mixed, sections=spectral), 1),
        "ViT-S student, windows": (student(4, 4, mixed, sections=windows), 1),
        "ViT-S student, frozen trunk": (finetuned(folder, 4, mixed, "frozen"), 1),
        "ViT-S student, low rank": (finetuned(folder, 4, mixed, "low_rank"), 1),
        "ViT-S student, low rank, 2 ranks": (finetuned(folder, 8, mixed, "low_rank"), 2),
        "quickstart, 2 ranks": (quickstart, 2),
        "quickstart, 4 ranks": (quickstart, 4),
        "ViT-S student, 2 ranks, ZeRO 1": (student(8, 4, {"zero_stage": 1}), 2),
        "ViT-S student, 2 ranks, ZeRO 2, 2 micro-batches": (student(16, 4, {"zero_stage": 2}), 2),
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints predicted and measured costs; returns 1 if one is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        named = {n: case for n, case in cases(Path(folder)).items() if chosen.only in n}
        return compare(named)


def compare(named: dict[str, tuple[dict[str, Any], int]]) -> int:
    """Prints a line for each case; returns 1 if one is off."""
    worst = 0.0
    for name, (tree, ranks) in named.items():
        predicted, size = predict(tree, ranks)
        measured: Figures = run_on_ranks(ranks, measure, tree, size, timeout_s=600)[0]
        line = f"{name:48s}"
        units = {"memory": (1e6, "MB"), "flops": (1e9, "GFLOP"), "exchanged": (1e6, "MB exchanged")}
        for field, (unit, word) in units.items():
            plan, run = getattr(predicted, field), getattr(measured, field)
            if run and not (field == "exchanged" and ranks == 1):
                error = plan / run - 1
                worst = max(worst, abs(error))
                line += f" {plan / unit:7.0f} / {run / unit:7.0f} {word} ({error:+.1%})"
        print(line, flush=True)
    print(f"largest error {worst:.1%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
