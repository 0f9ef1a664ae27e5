"""Pictures of a trained student's map beside its teachers'."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data.batch import scale_pixels
from data.images import load_images
from distill.display.pictures import draw_panels
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.tasks.trained import find_trained, load_trained


@torch.no_grad()
def draw_student(
    path: Path, target: Path, images: Sequence[Path], resolution: int | None = None
) -> None:
    """Draws a row for each image: the teachers' targets and the student's map, in common colours.

    Args:
        path: the PNG to write.
        target: see `find_trained`.
        images: images or folders of them.
        resolution: side of the student's input in pixels; None for the largest of the training.

    Raises:
        RecipeError: see `find_trained` and `load_trained`, or the student cannot take the size.
        DataError: the images cannot be read.
    """
    trained = find_trained(target, [])
    recipe = trained.recipe
    size = recipe.largest_resolution if resolution is None else (resolution, resolution)
    patch = recipe.student.patch_size
    if size[0] < patch or size[0] % patch:
        near = max(patch, round(size[0] / patch) * patch)
        raise RecipeError(
            f"--resolution {size[0]}: the student takes multiples of {patch} px; the nearest is "
            f"{near}"
        )
    loaded, _ = load_images(images, size)
    students, targets = load_trained(trained)
    pixels = scale_pixels(loaded, distributed.device())
    draw_panels(path, pixels, targets(pixels), {"student": students["trained"](pixels)})
