"""Builds the models of a recipe without weights, and prints its plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.planning.machine import Speed, find_gpu
from distill.planning.scaling import Scaling, measure_arms
from distill.planning.step import Workload
from distill.planning.student_step import StudentWorkload
from distill.planning.tables import (
    arm_table,
    assumptions,
    checkpointing_line,
    memory_table,
    time_table,
)
from distill.planning.upsampler_step import UpsamplerWorkload
from distill.runtime.config import load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.runtime.processor import bf16_line
from distill.tasks.student_kind import override_student
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from teachers.messages import did_you_mean

_TASKS = ("student", "upsampler")


def print_plan(
    recipe: Path, overrides: Sequence[str], gpu: str, counts: Sequence[int], utilisation: float
) -> None:
    """Prints the cost of each arm, and the memory and the time of a step on some numbers of GPUs.

    The utilisation is the share of the GPU's FLOP/s that the run achieves.

    Raises:
        RecipeError: the GPU is unknown, the recipe is invalid, or it does not divide over the GPUs.
    """
    found, tree = find_gpu(gpu), load_yaml(recipe)
    override_student(tree, overrides)
    workload = workload_of(tree, str(recipe))
    costs = measure_arms(workload)
    speed = Speed(found, workload.recipe.engine.precision, utilisation)
    console = Console()
    for cost in costs:
        console.print(arm_table(cost, workload.rows(cost.arm), speed).to_rich())
    scaling = Scaling(workload, costs, speed)
    steps = [scaling.on(count) for count in counts]
    console.print(memory_table(steps, workload.arms).to_rich())
    batch = sum(cost.arm.share * cost.arm.batch_size for cost in costs)
    console.print(time_table(steps, batch, gpu).to_rich())
    if isinstance(workload, StudentWorkload) and workload.may_checkpoint:
        fullest = max(costs, key=lambda cost: cost.trace.peak)
        workload.switch_checkpointing()
        other = workload.trace(fullest.arm, fullest.trace.images)
        print(checkpointing_line(workload.checkpointing, fullest, other))
    print("Assumptions:")
    for line in assumptions(speed, workload.recipe.data.workers):
        print(f"- {line}")
    here = bf16_line(workload.recipe.precisions)
    if here is not None:
        print(f"Measured on this machine, which has no GPU: {here}")


def workload_of(tree: dict[str, Any], where: str) -> Workload:
    """The models of a recipe with its overrides, without weights; `where` is for messages.

    Raises:
        RecipeError: it is not a valid recipe of a training.
    """
    task = tree.get("task", "student")
    if task == "student":
        return StudentWorkload(validate(StudentRecipe, tree, where))
    if task == "upsampler":
        return UpsamplerWorkload(validate(UpsamplerRecipe, tree, where))
    raise RecipeError(
        f"{where}: task: expected {' or '.join(_TASKS)}, got {task!r}"
        f"{did_you_mean(str(task), _TASKS)}; only trainings have a plan"
    )
