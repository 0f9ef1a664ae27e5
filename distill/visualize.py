"""Draws what encoders see: `python -m distill.visualize RECIPE|RUN|CHECKPOINT|FILE IMAGE ...`.

Of a student: its teachers' maps and its own. Of an upsampler: its encoder's map, what comes of it
on the way, and the upsampled map (figure 1 of FeatSharp), or, with `--bias` and any number of
upsamplers instead of images, the position biases that they learned (figure 11).

Exit codes: 0 done, 2 a user's mistake.
"""

import argparse
from pathlib import Path

import torch

from data.batch import scale_pixels
from data.images import load_images
from distill.display.pictures import draw_panels
from distill.runtime import distributed
from distill.runtime.command import command
from distill.runtime.config import load_yaml
from distill.runtime.errors import RecipeError
from distill.tasks.kinds import register_kinds
from distill.tasks.trained import find_trained, load_trained, recipe_file
from distill.tasks.upsampler_pictures import draw_biases, draw_upsampler, is_upsampler_file


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.visualize",
        description="Draw PCA panels in common colours: of a student its teachers' maps and its "
        "own, of an upsampler its encoder's map and what it becomes.",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="TARGET",
        help="a recipe (task student or upsampler), the folder of a run, one of its checkpoints, "
        "or an upsampler's file",
    )
    parser.add_argument(
        "others",
        type=Path,
        nargs="*",
        metavar="IMAGE",
        help="images or folders; with --bias, more upsamplers",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("features.png"), help="the PNG to write (%(default)s)"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--resolution", type=int, help="of a student's input in pixels; as trained by default"
    )
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
        raise RecipeError(f"--out {out}: the picture is a .png")
    if not arguments.bias and not others:
        raise RecipeError(f"{target}: name images or folders of them to draw it on")
    if arguments.bias:
        draw_biases(out, [target, *others])
    elif _is_upsampler(target):
        if arguments.resolution is not None:
            raise RecipeError(
                "--resolution: is a student's; an upsampler shows its factor times its encoder's"
            )
        draw_upsampler(out, target, others)
    else:
        _draw_student(out, target, others, arguments.resolution)
    print(out)


def _is_upsampler(target: Path) -> bool:
    if is_upsampler_file(target):
        return True
    return load_yaml(recipe_file(target)).get("task") == "upsampler"


@torch.no_grad()
def _draw_student(out: Path, target: Path, paths: list[Path], side: int | None) -> None:
    trained = find_trained(target, [])
    resolution = trained.recipe.largest_resolution if side is None else (side, side)
    patch = trained.recipe.student.patch_size
    if resolution[0] < patch or resolution[0] % patch:
        near = max(patch, round(resolution[0] / patch) * patch)
        raise RecipeError(
            f"--resolution {resolution[0]}: the student takes multiples of {patch} px; "
            f"the nearest is {near}"
        )
    images, _ = load_images(paths, resolution)
    students, targets = load_trained(trained)
    pixels = scale_pixels(images, distributed.device())
    draw_panels(out, pixels, targets(pixels), {"student": students["trained"](pixels)})


if __name__ == "__main__":
    main()
