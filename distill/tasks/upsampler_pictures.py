"""What an upsampler does to a map and to its encoder's fixed pattern: FeatSharp's figures 1 and 11.

Each reads a trained file, and whose it is from its card.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.batch import scale_pixels
from data.images import load_images
from distill.display.pictures import draw_maps, draw_side_by_side
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.tasks.trained import find_run, recipe_file
from distill.tasks.upsampler_recipe import load_upsampler_recipe
from teachers.build import build_teacher, parse_teacher
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher
from teachers.upsamplers.featsharp import FeatSharp
from teachers.upsamplers.resize import enlarge, resize
from teachers.upsamplers.tile import encode_tiles
from teachers.upsamplers.trained import SHIPPED, TrainedUpsampler, load_upsampler


def is_upsampler_file(target: Path) -> bool:
    """Whether a target is a trained upsampler itself, by path or by the name of a shipped one."""
    shipped = SHIPPED / f"{target}.safetensors"
    return target.suffix == ".safetensors" or (not target.exists() and shipped.is_file())


def find_upsampler(target: Path) -> Path:
    """The file of an upsampler; of a run, its newest whole checkpoint's.

    Args:
        target: such a file, the name of a shipped one, a recipe of `train_upsampler`, or the folder
            of a run or of a checkpoint.

    Raises:
        RecipeError: the target is of another task, or has no whole checkpoint yet.
    """
    if is_upsampler_file(target):
        return target
    recipe = load_upsampler_recipe(recipe_file(target), [])
    return find_run(target, recipe.run.dir)[1] / "upsampler.safetensors"


@torch.no_grad()
def draw_upsampler(path: Path, target: Path, images: Sequence[Path]) -> None:
    """Draws one row an image: the encoder's maps and the upsampler's, in common colours.

    Args:
        path: the PNG to write.
        target: see `find_upsampler`.
        images: images or folders of them.

    Raises:
        RecipeError: see `find_upsampler`.
        TeacherError: the file is none of an upsampler, or its encoder is not there.
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
    """What comes before an upsampled map, and that map; all in the encoder's own space.

    Enlarged maps start from the encoder's map as the upsampler sees it, without the encoder's fixed
    pattern; `raw` is with it.

    Args:
        upsampler: on the teacher's device.
        teacher: its encoder.
        images: (B, 3, H, W) in [0, 1], of the factor times the encoder's resolution.

    Returns:
        Title to (B, D, h, w): the encoder's map, the encoder's at the size of the images (the map
        of the tiles, where it does not take that size), bilinear interpolation, for FeatSharp the
        first input of its fusion, and the upsampler's map.
    """
    spec, inner = upsampler.spec, upsampler.inner
    height, width = images.shape[-2:]
    maps = {"raw": teacher(resize(images, spec.resolution)).spatial}
    if spec.accepts(height, width):
        maps[f"raw, {height} x {width} px"] = teacher(images).spatial
    else:
        maps["tiles"] = encode_tiles(images, teacher, spec, upsampler.factor)[1]
    fused: list[Tensor] = []
    if isinstance(inner, FeatSharp):
        hook = inner.fusion.register_forward_pre_hook(lambda _, inputs: fused.extend(*inputs))
    low, high = upsampler(images, teacher)
    maps["bilinear"] = enlarge(low.spatial, upsampler.factor)
    if isinstance(inner, FeatSharp):
        hook.remove()
        if inner.inputs[0] != "bilinear":
            maps[inner.inputs[0]] = upsampler.phi_s.inverse(fused[0].float())
    maps[upsampler.card.upsampler["kind"]] = high.spatial
    return maps


def draw_biases(path: Path, targets: Sequence[Path]) -> None:
    """Draws the position biases that upsamplers learned, side by side, each in colours of its own.

    The title says how strong one is: the root mean square of what differs between cells, where 1 is
    the deviation of the encoder's features.

    Args:
        path: the PNG to write.
        targets: see `find_upsampler`.

    Raises:
        RecipeError: see `find_upsampler`, or an upsampler learned no position bias.
        TeacherError: a file is none of an upsampler.
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
