"""Reads a checkpoint of the RADIO family in its public format (RADIOv2.5, arXiv 2412.07679).

A file is a `torch.save` of the namespace `args` and a state dict; on the Hugging Face hub it is a
`.safetensors` file with the same `args` in a `config.json` beside it. No code in a file is run.
`distill.formats.radio` writes students in this format.

The prefix of the trunk's names differs between models, so it is whatever precedes
`patch_generator.`. Names of the hub's files follow timm's converter. Heads for other teachers'
features are returned unchanged; any other unknown tensor is an error.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import lfs_hint
from teachers.errors import TeacherError
from teachers.messages import took
from teachers.radio_hub import hub_resolution
from teachers.weights import find_weights, read_json, read_tensors, shorten

_TABLE = "patch_generator.pos_embed"
TOKENS = "patch_generator.cls_token.token"
_EMBEDDER = "patch_generator.embedder.weight"

# Public names to those of timm's NaFlexVit, where they differ. The tokens are also split: the
# first is timm's class token, the others are its registers.
TO_TIMM = {
    _EMBEDDER: "embeds.proj.weight",
    "patch_generator.embedder.bias": "embeds.proj.bias",
    _TABLE: "embeds.pos_embed",
}
SPLIT_TOKENS = ("embeds.cls_token", "embeds.reg_token")

# Within the names of blocks: DINOv2's gated MLP, and the hub's spelling of LayerScale's weight.
_IN_BLOCKS = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2.", ".grandma": ".gamma"}

SUMMARY_HEADS, SPATIAL_HEADS = "_heads.", "_feature_projections."
_HEADS = (SUMMARY_HEADS, SPATIAL_HEADS)
_NORMALIZERS = ("_feature_normalizer.", "_intermediate_feature_normalizer.")


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


@dataclass(frozen=True)
class RadioCheckpoint:
    """The contents of a file.

    Attributes:
        architecture: of its trunk.
        tensors: of the trunk, by the names of timm's NaFlexVit.
        teachers: their entries in `args`, in order; a name may occur twice.
        heads: tensors of the heads for the teachers' features, by public names.
        resolution: the (height, width) in pixels that the hub's config states; None without it.
    """

    architecture: RadioArchitecture
    tensors: dict[str, Tensor]
    teachers: tuple[Mapping[str, Any], ...]
    heads: dict[str, Tensor]
    resolution: tuple[int, int] | None = None


def read_radio(path: Path) -> RadioCheckpoint:
    """Reads a checkpoint.

    Args:
        path: a file in the public format; or a `.safetensors` file with its `config.json` beside
            it, or their folder.

    Raises:
        TeacherError: damaged, not a RADIO checkpoint, or with unknown tensors.
    """
    if not path.exists():
        raise TeacherError(f"weights: {path} is not a file or directory here")
    if path.is_dir():
        path = find_weights(path, ("model.safetensors",))
    resolution = None
    if path.suffix == ".safetensors":
        config = read_json(path.parent / "config.json")
        args, tensors = _args(config, path), read_tensors(path)
        resolution = hub_resolution(config, path)
    else:
        args, tensors = _load(path)
    trunk, others = _split(tensors, path)
    architecture = _architecture(args, trunk, _conditioner(others, path), path)
    slots = others.get("summary_idxs")
    names = [architecture.class_tokens.index(name) for name in architecture.summary]
    if slots is not None and slots.tolist() != names:
        raise TeacherError(
            f"{path}: summary_idxs: expected the class tokens {names} of the teachers with a "
            f"summary, got {slots.tolist()}"
        )
    heads = {k: v for k, v in others.items() if k.startswith(_HEADS)}
    teachers = tuple(args.get("teachers") or ())
    return RadioCheckpoint(architecture, to_timm(trunk), teachers, heads, resolution)


def to_timm(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a trunk's tensors to the names and shapes of timm's NaFlexVit.

    The public names come without prefix; the position table is (1, S * S, C), the tokens are (class
    tokens + registers, C).
    """
    tensors = dict[str, Tensor]()
    for name, value in trunk.items():
        if name == TOKENS:
            parts = value[None, :1], value[None, 1:]
            tensors |= {k: v for k, v in zip(SPLIT_TOKENS, parts, strict=True) if v.numel()}
        elif name == _TABLE:
            side = math.isqrt(value.shape[1])
            tensors[TO_TIMM[name]] = value.unflatten(1, (side, side))
        else:
            for public, ours in _IN_BLOCKS.items():
                name = name.replace(public, ours)
            tensors[TO_TIMM.get(name, name)] = value
    return tensors


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`args` and the averaged weights, or the plain ones if there are none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "more than tensors and argparse.Namespace, or is damaged"
        raise TeacherError(
            f"{path} holds {what}, which is not unpickled; save it again with plain values"
            f"{lfs_hint(path)}"
        ) from None
    except Exception as error:  # damaged files raise exceptions of many types
        raise TeacherError(f"{path} cannot be read: {shorten(str(error))}") from None
    content = loaded if isinstance(loaded, Mapping) else {}
    sets = [key for key in ("state_dict_ema", "state_dict") if content.get(key)]
    state = content[sets[0]] if sets else content.get("state_dict")
    if sets:
        took(f"weights {path}", sets[0], sets, "the average wins in RADIO's own loader")
    if not isinstance(state, Mapping):
        raise TeacherError(
            f"{path} is not a RADIO checkpoint: it has neither state_dict_ema nor state_dict"
        )
    return _args(content, path), {k: v for k, v in state.items() if isinstance(v, Tensor)}


def _args(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, Mapping) or not isinstance(args.get("model"), str):
        raise TeacherError(f"{path} is not a RADIO checkpoint: it has no args that name a model")
    return dict(args)


def _split(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trunk without its prefix, and the other known tensors without the hub's prefix."""
    prefixes = [k.removesuffix(_EMBEDDER) for k in tensors if k.endswith(_EMBEDDER)]
    if len(prefixes) != 1:
        raise TeacherError(
            f"{path}: expected one tensor named *.{_EMBEDDER}, got {len(prefixes)}; only RADIO "
            "trunks with cropped position embeddings are supported"
        )
    prefix = prefixes[0]
    root = "radio_model." if prefix.startswith("radio_model.") else ""
    trunk = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    others = {k.removeprefix(root): v for k, v in tensors.items() if not k.startswith(prefix)}
    normalizers = [k for k in others if k.startswith(_NORMALIZERS)]
    if normalizers:
        raise TeacherError(
            f"{path} normalises its features ({normalizers[0]}), which is not supported; use the "
            "checkpoint of the same model without it"
        )
    reparametrised = [k for k in tensors if ".parametrizations." in k]
    if reparametrised:
        raise TeacherError(
            f"{path}: {reparametrised[0]} belongs to a parametrization; export the weights that "
            "it computes"
        )
    read = {"input_conditioner.norm_mean", "input_conditioner.norm_std", "summary_idxs"}
    unknown = [k for k in others if k not in read and not k.startswith(_HEADS)]
    if unknown:
        raise TeacherError(f"{path} holds unknown tensors: {', '.join(unknown[:5])}")
    return trunk, others


def _conditioner(
    others: Mapping[str, Tensor], path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = []
    for name in ("input_conditioner.norm_mean", "input_conditioner.norm_std"):
        if name not in others or others[name].numel() != 3:
            raise TeacherError(f"{path} has no {name} of 3 channels")
        values.append(tuple(others[name].flatten().double().tolist()))
    mean, std = values
    return mean, std


def _architecture(
    args: Mapping[str, Any],
    trunk: Mapping[str, Tensor],
    pixels: tuple[tuple[float, ...], tuple[float, ...]],
    path: Path,
) -> RadioArchitecture:
    patch_size, side = _sides(trunk, path)
    class_tokens, summary = _class_tokens(args, path)
    registers = len(trunk[TOKENS]) - len(class_tokens)
    for what, came, expected in (
        ("position table's side in pixels", side * patch_size, args.get("cpe_max_size")),
        ("number of registers", registers, _registers(args, len(class_tokens))),
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
    names = (_EMBEDDER, _TABLE, TOKENS)
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


def _class_tokens(args: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
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


def _registers(args: Mapping[str, Any], class_tokens: int) -> int:
    """The explicit number, or those that pad the class tokens to a multiple."""
    if args.get("cpe_num_registers"):
        return int(args["cpe_num_registers"])
    multiple = args.get("register_multiple")
    return int(multiple) - class_tokens % int(multiple) if multiple else 0
