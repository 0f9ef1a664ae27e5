"""Draws what teachers and student see: `python -m distill.visualize RECIPE|CHECKPOINT IMAGE ...`.

Exit codes: 0 done, 2 a user's mistake.
"""

import argparse
from pathlib import Path

import torch

from data.images import load_images
from distill import distributed
from distill.errors import RecipeError, command
from distill.pictures import draw_panels
from distill.trained import find_trained, load_trained


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.visualize",
        description="Draw PCA panels of the teachers' maps and the student's, in common colours.",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="RECIPE|CHECKPOINT",
        help="a student recipe, the folder of a run, or one of its checkpoints",
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images or folders")
    parser.add_argument(
        "--out", type=Path, default=Path("features.png"), help="the PNG to write (%(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, help="of the student's input in pixels; as trained by default"
    )
    return parser.parse_args(arguments)


@command
@torch.no_grad()
def main() -> None:
    """The command."""
    arguments = parse_arguments()
    trained = find_trained(arguments.target, [])
    side = arguments.resolution
    resolution = trained.recipe.run.resolution if side is None else (side, side)
    patch = trained.recipe.student.patch_size
    if resolution[0] < patch or resolution[0] % patch:
        near = max(patch, round(resolution[0] / patch) * patch)
        raise RecipeError(
            f"--resolution {resolution[0]}: the student takes multiples of {patch} px; "
            f"the nearest is {near}"
        )
    if arguments.out.suffix.lower() != ".png":
        raise RecipeError(f"--out {arguments.out}: the picture is a .png")
    images, _ = load_images(arguments.images, resolution)
    students, targets = load_trained(trained)
    pixels = images.to(distributed.device()).float() / 255
    outputs = {"student": students["trained"](pixels)}
    draw_panels(arguments.out, pixels, targets(pixels), outputs)
    print(arguments.out)


if __name__ == "__main__":
    main()
