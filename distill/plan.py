"""Says what a recipe will cost: `python -m distill.plan RECIPE [key=value ...]`.

No weights, no images and no GPU are needed: a micro-batch runs through the recipe's own models on
tensors without memory. Prints what each model takes, what a rank holds, and how long the run takes
on GPUs of a kind. Exit codes: 0 done, 2 a user's mistake.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.planning.machine import GPUS, Speed, find_gpu
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
from distill.runtime.command import command
from distill.runtime.config import apply_overrides, load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.tasks.kinds import register_kinds
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from teachers.messages import did_you_mean

_TASKS = ("student", "upsampler")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.plan",
        description="Sizes, FLOPs, memory and hours of a training recipe, without weights, images "
        "or a GPU.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, see recipes/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as run.micro_batch_size=8",
    )
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)}; default h100"
    )
    parser.add_argument(
        "--gpus",
        default="1,8",
        metavar="N,N,...",
        help="how many of them, such as 8,64,512; default 1,8. The batch stays the recipe's",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the GPU's rate at which FLOPs are done; default 0.4",
    )
    return parser.parse_intermixed_args(arguments)


@command
def main() -> None:
    """The command."""
    register_kinds()
    arguments = parse_arguments()
    gpu, counts = find_gpu(arguments.gpu), _counts(arguments.gpus)
    if not 0 < arguments.mfu <= 1:
        raise RecipeError(f"--mfu {arguments.mfu}: a share of the GPU's rate, above 0 and up to 1")
    tree = load_yaml(arguments.recipe)
    apply_overrides(tree, arguments.overrides)
    workload = workload_of(tree, str(arguments.recipe))
    costs = measure_arms(workload)
    speed = Speed(gpu, workload.recipe.engine.precision, arguments.mfu)
    scaling = Scaling(workload, costs, speed)
    console = Console()
    for cost in costs:
        table = arm_table(cost, workload.rows(cost.arm), speed)
        console.print(table.to_rich())
    steps = [scaling.on(count) for count in counts]
    console.print(memory_table(steps, workload.arms).to_rich())
    batch = sum(cost.arm.share * cost.arm.batch_size for cost in costs)
    console.print(time_table(steps, batch, arguments.gpu).to_rich())
    if isinstance(workload, StudentWorkload) and workload.may_checkpoint:
        fullest = max(costs, key=lambda cost: cost.trace.peak)
        workload.switch_checkpointing()
        other = workload.trace(fullest.arm, fullest.trace.images)
        print(checkpointing_line(workload.checkpointing, fullest, other))
    print("Assumed:")
    for line in assumptions(speed, workload.recipe.data.workers):
        print(f"- {line}")


def workload_of(tree: dict[str, Any], where: str) -> Workload:
    """The models of a recipe, without weights.

    Args:
        tree: the recipe, with overrides applied.
        where: what to call it in a message.

    Raises:
        RecipeError: no recipe of a training, or one that is not valid.
    """
    task = tree.get("task", "student")
    if task == "student":
        return StudentWorkload(validate(StudentRecipe, tree, where))
    if task == "upsampler":
        return UpsamplerWorkload(validate(UpsamplerRecipe, tree, where))
    raise RecipeError(
        f"{where}: task: {task!r} trains nothing{did_you_mean(str(task), _TASKS)}; a plan is of "
        f"{' or '.join(_TASKS)}"
    )


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise RecipeError(f"--gpus {text}: numbers of GPUs are due, such as 8,64,512")
    return counts


if __name__ == "__main__":
    main()
