"""The architecture of a RADIO trunk, from its `args` and the shapes of its tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from teachers.errors import TeacherError

# Public names of tensors of the trunk.
TABLE = "patch_generator.pos_embed"
TOKENS = "patch_generator.cls_token.token"
EMBEDDER = "patch_generator.embedder.weight"


@dataclass(frozen=True, kw_only=True)
class RadioArchitecture:
    """The architecture of a trunk.

    Attributes:
        model: name of a timm ViT, or of one that the public code registers.
        model_kwargs: options of that model that its name does not imply.
        patch_size: pixels per token, along both axes.
        table_side: cells of the square position table, along each axis.
        class_tokens: the teacher of each class token, in order; one empty name if they share one.
        summary: those of `class_tokens` that form the published summary.
        registers: number of register tokens, which follow the class tokens.
        final_norm: whether the trunk has a final norm (`model_norm`).
        layer_scale: whether blocks have LayerScale.
        patch_bias: whether the patch embedding has a bias.
        mean: of the pixel normalisation.
        std: of the same.
    """

    model: str
    model_kwargs: Mapping[str, Any]
    patch_size: int
    table_side: int
    class_tokens: tuple[str, ...]
    summary: tuple[str, ...]
    registers: int
    final_norm: bool
    layer_scale: bool
    patch_bias: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


def architecture_of(
    args: Mapping[str, Any],
    trunk: Mapping[str, Tensor],
    pixels: tuple[tuple[float, ...], tuple[float, ...]],
    path: Path,
) -> RadioArchitecture:
    """The architecture of a trunk.

    Args:
        args: the public ones.
        trunk: its tensors by public names, without prefix.
        pixels: mean and std of the pixel normalisation.
        path: the file, for messages.

    Raises:
        TeacherError: `args` and tensors do not fit.
    """
    patch_size, side = _sides(trunk, path)
    class_tokens, summary = class_tokens_of(args, path)
    registers = len(trunk[TOKENS]) - len(class_tokens)
    for what, came, expected in (
        ("position table's side in pixels", side * patch_size, args.get("cpe_max_size")),
        ("number of registers", registers, registers_of(args, len(class_tokens))),
        ("final norm", "norm.weight" in trunk, bool(args.get("model_norm", False))),
    ):
        if came != expected:
            raise TeacherError(f"{path}: the {what} is {came}, but {expected} in its args")
    swiglu = any(".mlp.w12." in k for k in trunk)
    return RadioArchitecture(
        # DINOv2's gated MLP under its own names: only the giant model has it.
        model="vit_giant_patch14_reg4_dinov2" if swiglu else args["model"],
        model_kwargs=dict(args.get("model_kwargs") or {}),
        patch_size=patch_size,
        table_side=side,
        class_tokens=class_tokens,
        summary=summary,
        registers=registers,
        final_norm="norm.weight" in trunk,
        layer_scale=any(re.search(r"ls1\.(gamma|grandma)$", k) for k in trunk),
        patch_bias="patch_generator.embedder.bias" in trunk,
        mean=pixels[0],
        std=pixels[1],
    )


def _sides(trunk: Mapping[str, Tensor], path: Path) -> tuple[int, int]:
    """Pixels of a patch and cells of the position table, along one axis."""
    names = (EMBEDDER, TABLE, TOKENS)
    missing = [name for name in names if name not in trunk]
    if missing:
        raise TeacherError(f"{path} has no {', no '.join(missing)}")
    shapes = [tuple(trunk[name].shape) for name in names]
    patch_size, side = math.isqrt(shapes[0][-1] // 3), math.isqrt(shapes[1][-2])
    width = shapes[0][0]
    expected = [(width, 3 * patch_size**2), (1, side**2, width), (len(trunk[TOKENS]), width)]
    if shapes != expected:
        raise TeacherError(
            f"{path}: {', '.join(names)}: expected the shapes (C, 3 * p * p), (1, S * S, C) and "
            f"(tokens, C), got {shapes}"
        )
    return patch_size, side


def class_tokens_of(args: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The teachers of all class tokens, and those of the summary tokens."""
    if not args.get("cls_token_per_teacher", False):
        return ("",), ("",)
    teachers = args.get("teachers") or []
    if not all(isinstance(each, Mapping) and "name" in each for each in teachers):
        raise TeacherError(f"{path}: a teacher in its args has no name")
    names = tuple(dict.fromkeys(each["name"] for each in teachers))
    for each in teachers:
        slot = each.get("token_slot")
        if slot is not None and slot != names.index(each["name"]):
            raise TeacherError(
                f"{path}: teacher {each['name']!r} has token_slot {slot}, expected its place among "
                f"the teachers {list(names)}"
            )
    chosen = {each["name"] for each in teachers if each.get("use_summary", True)}
    if not chosen:
        raise TeacherError(f"{path}: no teacher in its args has a summary")
    return names, tuple(name for name in names if name in chosen)


def registers_of(args: Mapping[str, Any], class_tokens: int) -> int:
    """The explicit number, or those that pad the class tokens to a multiple."""
    if args.get("cpe_num_registers"):
        return int(args["cpe_num_registers"])
    multiple = args.get("register_multiple")
    return int(multiple) - class_tokens % int(multiple) if multiple else 0


def unnamed(count: int) -> tuple[str, ...]:
    """The names of class tokens that belong to no teacher that is known: `cls_0`, `cls_1`, ..."""
    return tuple(f"cls_{i}" for i in range(count))


def named_as(architecture: RadioArchitecture, published: RadioArchitecture) -> RadioArchitecture:
    """An architecture whose class tokens, if no teacher is known, have the published names."""
    own, names = architecture.class_tokens, published.class_tokens
    if own != unnamed(len(names)):
        return architecture
    named = dict(zip(own, names, strict=True))
    summary = tuple(named[name] for name in architecture.summary)
    return replace(architecture, class_tokens=names, summary=summary)
