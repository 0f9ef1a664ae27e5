"""Pictures of a trained student's maps, of an upsampler's, and of an upsampler's position bias.

Those of upsamplers are figures 1 and 11 of FeatSharp.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.batch import scale_pixels
from data.images import load_images
from distill.display.pictures import draw_maps, draw_panels, draw_side_by_side
from distill.runtime import distributed
from distill.runtime.config import load_yaml
from distill.runtime.errors import RecipeError
from distill.tasks.trained import find_run, find_trained, load_trained, recipe_file
from distill.tasks.upsampler_recipe import load_upsampler_recipe
from teachers.build import build_teacher, parse_teacher
from teachers.even_cells import even_encoder
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher
from teachers.upsamplers.featsharp import FeatSharp
from teachers.upsamplers.resize import enlarge, resize
from teachers.upsamplers.tile import encode_tiles
from teachers.upsamplers.trained import SHIPPED, TrainedUpsampler, load_upsampler


@torch.no_grad()
def draw_student(
    path: Path, target: Path, images: Sequence[Path], resolution: int | None = None
) -> None:
    """Draws a row for each image: the teachers' targets and the student's map, in common colours.

    Args:
        path: the PNG to write.
        target: see `find_trained`.
        images: files or folders.
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


def is_upsampler(target: Path) -> bool:
    """Whether a target is a trained upsampler, or a recipe, run or checkpoint of one.

    Raises:
        RecipeError: the target is a folder without a recipe.
    """
    return _is_file(target) or load_yaml(recipe_file(target)).get("task") == "upsampler"


def _is_file(target: Path) -> bool:
    """Whether a target is an upsampler's file, by path or by the name of a shipped one."""
    shipped = SHIPPED / f"{target}.safetensors"
    return target.suffix == ".safetensors" or (not target.exists() and shipped.is_file())


def find_upsampler(target: Path) -> Path:
    """The file of an upsampler; of a run, that of its newest complete checkpoint.

    Args:
        target: the file, the name of a shipped one, a recipe of `train_upsampler`, or the folder
            of a run or of a checkpoint.

    Raises:
        RecipeError: the target is of another task, or has no complete checkpoint yet.
    """
    if _is_file(target):
        return target
    recipe = load_upsampler_recipe(recipe_file(target), [])
    return find_run(target, recipe.run.dir)[1] / "upsampler.safetensors"


@torch.no_grad()
def draw_upsampler(path: Path, target: Path, images: Sequence[Path]) -> None:
    """Draws a row for each image: the encoder's maps and the upsampler's, in common colours.

    The images are files or folders of them; for the target see `find_upsampler`.

    Raises:
        RecipeError: see `find_upsampler`.
        TeacherError: the file is not an upsampler's, or its encoder cannot be built.
        DataError: the images cannot be read.
    """
    file = find_upsampler(target)
    upsampler = load_upsampler(file)
    pixels, _ = load_images(images, upsampler.resolution)
    device = distributed.device()
    teacher = build_teacher(parse_teacher(upsampler.card.teacher), device=device)
    upsampler.check_encoder(teacher_fingerprint(teacher))
    shown = scale_pixels(pixels, device)
    draw_maps(path, shown, stages(upsampler.to(device), teacher, shown))


def stages(upsampler: TrainedUpsampler, teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
    """The maps that lead to an upsampled map, and that map; all in the encoder's own space.

    Enlarged maps start from the encoder's map as the upsampler sees it, without the encoder's fixed
    pattern; `raw` has the pattern.

    Args:
        upsampler: on the teacher's device.
        teacher: its encoder.
        images: (B, 3, H, W) in [0, 1], of the factor times the encoder's resolution.

    Returns:
        Title to map (B, D, h, w): the encoder's, the encoder's at the size of the images (or of
        tiles, if it does not take that size), the bilinearly interpolated, for FeatSharp the first
        input of its fusion, and the upsampler's.
    """
    spec, inner = upsampler.spec, upsampler.inner
    height, width = images.shape[-2:]
    encode = even_encoder(teacher)
    maps = {"raw": encode(resize(images, spec.resolution)).spatial}
    if spec.accepts(height, width):
        maps[f"raw, {height} x {width} px"] = encode(images).spatial
    else:
        maps["tiles"] = encode_tiles(images, encode, spec, upsampler.factor)[1]
    fused: list[Tensor] = []
    if isinstance(inner, FeatSharp):
        hook = inner.fusion.register_forward_pre_hook(lambda _, inputs: fused.extend(*inputs))
    low, high = upsampler(images, encode)
    maps["bilinear"] = enlarge(low.spatial, upsampler.factor)
    if isinstance(inner, FeatSharp):
        hook.remove()
        if inner.inputs[0] != "bilinear":
            maps[inner.inputs[0]] = upsampler.phi_s.inverse(fused[0].float())
    maps[upsampler.card.upsampler["kind"]] = high.spatial
    return maps


def draw_biases(path: Path, targets: Sequence[Path]) -> None:
    """Draws the position biases that upsamplers learned, side by side, each in colours of its own.

    The title has the root mean square of the bias's deviation from its mean over cells, in units of
    the standard deviation of the encoder's features.

    Args:
        path: the PNG to write.
        targets: see `find_upsampler`.

    Raises:
        RecipeError: see `find_upsampler`, or an upsampler learned no position bias.
        TeacherError: a file is not an upsampler's.
    """
    biases = []
    for target in targets:
        upsampler = load_upsampler(find_upsampler(target))
        if upsampler.bias is None:
            raise RecipeError(
                f"{target}: learned no position bias; train with `bias: true` to see one"
            )
        bias, card = upsampler.bias.map, upsampler.card
        strength = (bias - bias.mean((1, 2), keepdim=True)).square().mean().sqrt()
        name = card.teacher.get("model") or card.teacher["kind"]
        biases.append((f"{name}, rms {strength:.2g}", bias[None]))
    draw_side_by_side(path, biases)
