"""Draws features as PCA panels: `python -m distill.visualize RECIPE|RUN|CHECKPOINT|FILE IMAGE ...`.

Of a student: its teachers' maps and its own. Of an upsampler: its encoder's map, the maps in
between, and the upsampled map (figure 1 of FeatSharp), or, with `--bias` and any number of
upsamplers instead of images, the position biases that they learned (figure 11).

Exit codes: 0 done, 2 a user's mistake.
"""

import argparse
from pathlib import Path

from data.text import printable
from distill.runtime.command import command
from distill.runtime.errors import RecipeError
from distill.tasks.kinds import register_kinds
from distill.tasks.pictures import draw_biases, draw_student, draw_upsampler, is_upsampler


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.visualize",
        description="Draw PCA panels in common colours: of a student its teachers' maps and its "
        "own, of an upsampler its encoder's map and the upsampled one.",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="TARGET",
        help="a recipe (task student or upsampler), the folder of a run, one of its checkpoints, "
        "or an upsampler's file",
    )
    more = "images or folders; with --bias, more upsamplers"
    parser.add_argument("others", type=Path, nargs="*", metavar="IMAGE", help=more)
    parser.add_argument(
        "--out", type=Path, default=Path("features.png"), help="the PNG to write (%(default)s)"
    )
    only = parser.add_mutually_exclusive_group()
    side = "of a student's input in pixels; default: the largest trained"
    only.add_argument("--resolution", type=int, help=side)
    only.add_argument(
        "--bias", action="store_true", help="draw the position biases that upsamplers learned"
    )
    return parser.parse_args(arguments)


@command
def main() -> None:
    """The command."""
    register_kinds()
    arguments = parse_arguments()
    target, others, out = arguments.target, arguments.others, arguments.out
    if out.suffix.lower() != ".png":
        raise RecipeError(f"--out {out}: expected a .png file")
    if not arguments.bias and not others:
        raise RecipeError(f"{target}: give images, or folders of images, to draw it on")
    if arguments.bias:
        draw_biases(out, [target, *others])
    elif is_upsampler(target):
        if arguments.resolution is not None:
            raise RecipeError(
                "--resolution: is for students; an upsampler has its factor times its encoder's"
            )
        draw_upsampler(out, target, others)
    else:
        draw_student(out, target, others, arguments.resolution)
    print(printable(out))


if __name__ == "__main__":
    main()
