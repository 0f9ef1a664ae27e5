"""Predicts the cost of a training recipe: `python -m distill.plan RECIPE [key=value ...]`.

It needs no weights, no images and no GPU: one micro-batch runs through the recipe's own models on
tensors without memory. Prints the cost of each model, the memory of a rank, and the time of the run
on GPUs of one kind. Exit codes: 0 done, 2 a user's mistake.
"""

import argparse
from pathlib import Path

from distill.planning.machine import GPUS
from distill.planning.run import print_plan
from distill.runtime.command import command
from distill.runtime.errors import RecipeError
from distill.tasks.kinds import register_kinds


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.plan",
        description="Predict the sizes, FLOPs, memory and hours of a training recipe, without "
        "weights, images or a GPU.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, see recipes/")
    changes = "changes to the recipe, such as run.micro_batch_size=8"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=changes)
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)}; default h100"
    )
    parser.add_argument(
        "--gpus",
        default="1,8",
        metavar="N,N,...",
        help="numbers of GPUs to compare, such as 8,64,512; default 1,8. The batch size is always "
        "that of the recipe",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="the share of the GPU's FLOP/s that the run achieves; default 0.4",
    )
    return parser.parse_intermixed_args(arguments)


@command
def main() -> None:
    """The command."""
    register_kinds()
    arguments = parse_arguments()
    counts = _counts(arguments.gpus)
    if not 0 < arguments.mfu <= 1:
        raise RecipeError(f"--mfu {arguments.mfu}: expected a share above 0, at most 1")
    print_plan(arguments.recipe, arguments.overrides, arguments.gpu, counts, arguments.mfu)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(number) for number in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise RecipeError(f"--gpus {text}: expected numbers of GPUs, such as 8,64,512")
    return counts


if __name__ == "__main__":
    main()
