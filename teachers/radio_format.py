"""Reads a checkpoint of the RADIO family in its public format (RADIOv2.5, arXiv 2412.07679).

A file is a `torch.save` of the namespace `args` and a state dict; on the Hugging Face hub it is a
`.safetensors` file with the same `args` in a `config.json` beside it, or with the fields of
transformers' own RADIO model (`teachers.radio_builtin`). No code in a file is run.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import lfs_hint
from teachers.errors import TeacherError
from teachers.messages import took
from teachers.radio_architecture import (
    EMBEDDER,
    TABLE,
    TOKENS,
    RadioArchitecture,
    architecture_of,
)
from teachers.radio_builtin import public_args, read_builtin
from teachers.radio_builtin_weights import public_tensors
from teachers.radio_hub import (
    ADAPTORS,
    SPATIAL_HEADS,
    SUMMARY_HEADS,
    hub_head_name,
    hub_resolution,
    hub_teachers,
)
from teachers.weights import find_weights, read_json, read_tensors, shorten

# Public names to those of timm's NaFlexVit, where they differ. The tokens are also split: the
# first is timm's class token, the others are its registers.
TO_TIMM = {
    EMBEDDER: "embeds.proj.weight",
    "patch_generator.embedder.bias": "embeds.proj.bias",
    TABLE: "embeds.pos_embed",
}
SPLIT_TOKENS = ("embeds.cls_token", "embeds.reg_token")

# Within the names of blocks: DINOv2's gated MLP, and the hub's spelling of LayerScale's weight.
_IN_BLOCKS = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2.", ".grandma": ".gamma"}

_HEADS = (SUMMARY_HEADS, SPATIAL_HEADS, ADAPTORS)
_NORMALIZERS = ("_feature_normalizer.", "_intermediate_feature_normalizer.")


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

    @property
    def head_names(self) -> tuple[str, ...]:
        """The teachers that have a head: their names or, in older files, their indices."""
        return tuple(dict.fromkeys(name.split(".")[1] for name in self.heads))


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
    stated, tensors, config = _read(path)
    builtin = read_builtin(config, path)
    args = {} if builtin and stated is None else _checked(stated, path)
    if builtin:
        args, tensors = public_args(builtin, args, path), public_tensors(builtin, tensors, path)
    trunk, others = _split(tensors, path)
    architecture = architecture_of(args, trunk, _conditioner(others, path), path)
    if builtin:
        summary = tuple(architecture.class_tokens[i] for i in builtin.summary)
        architecture = replace(architecture, summary=summary)
    slots = others.get("summary_idxs")
    names = [architecture.class_tokens.index(name) for name in architecture.summary]
    if slots is not None and slots.tolist() != names:
        raise TeacherError(
            f"{path}: summary_idxs: expected the class tokens {names} of the teachers with a "
            f"summary, got {slots.tolist()}"
        )
    return RadioCheckpoint(
        architecture,
        to_timm(trunk),
        hub_teachers(config, args),
        {name: value for name, value in others.items() if name.startswith(_HEADS)},
        hub_resolution(config, path),
    )


def _read(path: Path) -> tuple[Any, dict[str, Tensor], Mapping[str, Any]]:
    """`args`, if there are any, the weights, and the content of the hub's `config.json`."""
    if path.suffix != ".safetensors":
        return *_load(path), {}
    config = read_json(path.parent / "config.json")
    return config.get("args"), read_tensors(path), config


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
        elif name == TABLE:
            side = math.isqrt(value.shape[1])
            tensors[TO_TIMM[name]] = value.unflatten(1, (side, side))
        else:
            for public, ours in _IN_BLOCKS.items():
                name = name.replace(public, ours)
            tensors[TO_TIMM.get(name, name)] = value
    return tensors


def _load(path: Path) -> tuple[Any, dict[str, Tensor]]:
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
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return args, {k: v for k, v in state.items() if isinstance(v, Tensor)}


def _checked(args: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(args, Mapping) or not isinstance(args.get("model"), str):
        raise TeacherError(f"{path} is not a RADIO checkpoint: it has no args that name a model")
    return args


def _split(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trunk without its prefix, and the other known tensors without the hub's prefix."""
    prefixes = [k.removesuffix(EMBEDDER) for k in tensors if k.endswith(EMBEDDER)]
    if len(prefixes) != 1:
        raise TeacherError(
            f"{path}: expected one tensor named *.{EMBEDDER}, got {len(prefixes)}; only RADIO "
            "trunks with cropped position embeddings are supported"
        )
    prefix = prefixes[0]
    root = "radio_model." if prefix.startswith("radio_model.") else ""
    trunk = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    others = {
        hub_head_name(k.removeprefix(root)): v
        for k, v in tensors.items()
        if not k.startswith(prefix)
    }
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
