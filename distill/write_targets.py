"""Writes a cache of targets: `python -m distill.write_targets RECIPE FOLDER [key=value ...]`.

The teachers run once over the images of a student's recipe, for its `run.steps`, at its sizes and
by its routes. A recipe with `targets.cached: FOLDER` then trains without them. Under `deepspeed`
every rank writes its share. A command that was stopped or killed goes on when it is given again.
"""

import argparse
from pathlib import Path
from typing import get_args

from distill.runtime.command import command
from distill.runtime.stopping import interruptible, listening
from distill.runtime.tracking import start_logging
from distill.targets.target_cache import CachePrecision
from distill.tasks.cached_targets import write_cache
from distill.tasks.kinds import register_kinds
from distill.tasks.student_recipe import load_student_recipe


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.write_targets",
        description="Run a student's teachers once and write their targets, for runs that train "
        "without teachers by targets.cached=FOLDER.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a student's YAML file")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the cache goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--precision",
        choices=get_args(CachePrecision),
        default="int8",
        help="of the maps; int8, the default, needs objective.standardisation=phi_s",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args()


@command
def main() -> None:
    """The command."""
    register_kinds()
    options = parse_arguments()
    with listening(), interruptible():
        recipe = load_student_recipe(options.recipe, options.overrides)
        start_logging()
        write_cache(recipe, options.folder, options.precision)


if __name__ == "__main__":
    main()
