"""A quick check of a user's teacher before training; `teachers.testing` has the complete one."""

from typing import get_args

import torch
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher, TeacherConfig

# Relative to the largest feature: more than kernels differ with the batch size, far less than
# dropout or swapped images do.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def dry_run(teacher: Teacher) -> None:
    """Encodes two random images, then the first alone, and checks the features.

    Three images in all, as large encoders are slow. On the meta device only types and shapes are
    checked.

    Raises:
        TeacherError: the teacher breaks the contract of `Teacher`; names the place.
    """
    name = type(teacher).__name__
    if not isinstance(getattr(teacher, "spec", None), FeatureSpec):
        raise TeacherError(
            f"{name} has no spec: its __init__ must call super().__init__(spec, ...)"
        )
    for method in ("forward", "freeze", "train"):
        if getattr(type(teacher), method) is not getattr(Teacher, method):
            raise TeacherError(f"{name} overrides {method}; implement extract only")
    _check_licence(type(teacher).Config, name)
    _check_pixels(teacher, name)
    images = probe_images(teacher)
    both = encode(teacher, images)
    if both.spatial.requires_grad or any(p.requires_grad for p in teacher.parameters()):
        raise TeacherError(f"{name} is not frozen: some of its parameters require gradients")
    training = [key or name for key, module in teacher.named_modules() if module.training]
    if training:
        raise TeacherError(f"{name} is not in eval mode: {', '.join(training[:3])}")
    if images.is_meta:
        return
    once = encode(teacher, images[:1])
    for field in ("summary", "spatial"):
        two, one = getattr(both, field), getattr(once, field)
        if two is None:
            continue
        what = f"{name}.extract: the {field}"
        if not torch.isfinite(two).all():
            raise TeacherError(f"{what} holds NaN or infinity")
        if two.dtype != torch.float32:
            raise TeacherError(f"{what} is {two.dtype}, not float32")
        if differ(teacher, two[:1], one):
            again = getattr(encode(teacher, images[:1]), field)
            raise TeacherError(f"{what} {_reason(differ(teacher, one, again))}")
    if torch.equal(both.spatial[0], both.spatial[1]):
        raise TeacherError(f"{name}.extract: two different images have the same map")


def _check_pixels(teacher: Teacher, name: str) -> None:
    """The normalisation is one of images in [0, 1]."""
    mean, std = teacher.normalization
    if not (len(mean) == len(std) == 3 and max(map(abs, (*mean, *std))) <= 2 and min(std) > 0):
        raise TeacherError(
            f"{name}: mean {mean} and std {std}: expected three numbers each for images in [0, 1], "
            "std positive; divide values for 0..255 by 255"
        )


def _check_licence(config: type[TeacherConfig], name: str) -> None:
    """`licence` is a method, or a text in its place: it is printed before any training."""
    field = config.model_fields.get("licence")
    if field is None:
        given: object = getattr(config, "licence", None)
        fine = given is None or callable(given) or isinstance(given, str)
    else:
        fine = {field.annotation, *get_args(field.annotation)} <= {str, type(None), str | None}
    if not fine:
        raise TeacherError(
            f"{name}: {config.__name__}.licence must be a text, `licence: str`, or a method that "
            "returns one"
        )


def _reason(random: bool) -> str:
    if random:
        return "of one image differs from call to call; is dropout active?"
    return (
        "of an image depends on the other images in its batch; does it normalise or pool over the "
        "batch, or change the order?"
    )


def probe_images(teacher: Teacher) -> Tensor:
    """Two random images (2, 3, H, W) in [0, 1], on the teacher's device.

    Of 2 x 3 cells if it accepts any resolution, else of its native size.
    """
    spec = teacher.spec
    size = (2 * spec.patch_size, 3 * spec.patch_size) if spec.any_resolution else spec.resolution
    device = teacher.mean.device
    if device.type == "meta":
        return torch.empty(2, 3, *size, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, *size, generator=generator, device="cpu").to(device)


def encode(teacher: Teacher, images: Tensor) -> Features:
    """Runs the teacher; any exception becomes a TeacherError with the shape of the images."""
    try:
        features = teacher(images)
    except Exception as error:  # a user's own code may raise anything
        size = tuple(images.shape)
        raise TeacherError(
            f"{type(teacher).__name__} fails on images of shape {size}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return features


def differ(teacher: Teacher, a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by more than the teacher's precision explains."""
    tolerance = _TOLERANCE[_coarsest(teacher)]
    # `not <=`, so that NaN differs too.
    return not bool((a - b).abs().max() <= tolerance * b.abs().max())


def _coarsest(teacher: Teacher) -> torch.dtype:
    """The coarsest precision of the teachers inside: an upsampled teacher holds another one."""
    found = {m.compute_dtype for m in teacher.modules() if isinstance(m, Teacher)}
    return max(found, key=_TOLERANCE.__getitem__)
