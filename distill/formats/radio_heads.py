"""The heads of a student in the public format of the RADIO family, and back.

A head of MLP version v2 is a student's as it is. Version `attn` (C-RADIOv4, arXiv 2601.17237), for
maps only, is two ViT blocks of 16 heads without biases of queries, keys and values, `blocks.*`,
and behind them `mlp.*`, a v2 without inner layers: a student's head with `attention_blocks: 2`.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill.runtime.errors import RecipeError
from student.config import HeadConfig, StudentConfig
from student.heads import MLP2, attention_blocks
from student.storage import StudentFile
from teachers.radio_format import RadioCheckpoint
from teachers.radio_hub import SPATIAL_HEADS, SUMMARY_HEADS

log = logging.getLogger(__name__)

ATTN_BLOCKS, ATTN_HEADS = 2, 16  # of the format, whose files do not state them
_QKV_BIAS = "attn.qkv.bias"


def refuse_heads(file: StudentFile) -> None:
    """Refuses a student with heads that the format has no place for.

    Raises:
        RecipeError: names the key of the recipe.
    """
    head = file.config.head
    kept = [name for name in file.targets if head.has(name)]
    if not head.attention_blocks or not kept:
        return
    denser = [name for name in kept if head.upsample.get(name, 1) > 1]
    biased = any(value.any() for key, value in file.state_dict.items() if _is_bias(key))
    why = None
    if (head.attention_blocks, head.attention_heads) != (ATTN_BLOCKS, ATTN_HEADS):
        why = (
            f"student.head: {head.attention_blocks} attention_blocks with {head.attention_heads} "
            f"attention_heads; those of the format are {ATTN_BLOCKS} with {ATTN_HEADS}"
        )
    elif denser:
        why = (
            f"student.head.upsample: the map of {', '.join(denser)} is denser than the grid, which "
            "RADIO's loader cannot read together with student.head.attention_blocks"
        )
    elif biased:
        why = (
            "student.head.attention_bias: the queries, keys and values of its attention heads have "
            "a bias, as those of older students have, and the format has no place for it"
        )
    if why:
        raise RecipeError(
            f"--format radio: {why}; use safetensors, or drop the heads with --no-heads"
        )


def spatial_version(file: StudentFile) -> str | None:
    """The format's `spatial_mlp_version` of a student; None where it is `mlp_version`."""
    head = file.config.head
    return "attn" if head.attention_blocks and any(map(head.has, file.targets)) else None


def public_heads(file: StudentFile) -> dict[str, Tensor]:
    """The weights of a student's heads under public names."""
    state = dict[str, Tensor]()
    version = spatial_version(file)
    prefixes = {
        "summary": (SUMMARY_HEADS, ""),
        "spatial": (SPATIAL_HEADS, "mlp." if version else ""),
        "attention": (SPATIAL_HEADS, "blocks."),
    }
    for name, value in file.state_dict.items():
        if name.startswith("heads.") and not _is_bias(name):
            _, teacher, kind, rest = name.split(".", 3)
            prefix, part = prefixes[kind]
            state[f"{prefix}{teacher}.{part}{rest}"] = value
    for name, target in file.targets.items():
        if target.summary_dim is None and file.config.head.has(name):
            assert isinstance(file.config, StudentConfig)
            zero = MLP2(file.config.shape.width, 1, hidden_dim=1, num_layers=0).state_dict()
            state |= {f"{SUMMARY_HEADS}{name}.{k}": v.zero_() for k, v in zero.items()}
    return state


def _is_bias(name: str) -> bool:
    """Whether a weight of a student is a bias of queries, keys and values in a head."""
    return name.startswith("heads.") and name.endswith(_QKV_BIAS)


class _Sizes(NamedTuple):
    """What heads show of a student's `HeadConfig`; None where they do not show it."""

    hidden_dim: int
    num_layers: int | None
    attention_blocks: int | None


def read_heads(checkpoint: RadioCheckpoint, path: Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """The heads that a student can have, and their weights under the names of a student.

    Heads of other versions, or that differ in size from the first one, are left out with a warning.
    """
    state, upsample = dict[str, Tensor](), dict[str, int]()
    kept, sizes = list[str](), list[_Sizes]()
    for place, teacher in enumerate(checkpoint.teachers):
        name = teacher["name"]
        kinds = {"spatial": _find(checkpoint, SPATIAL_HEADS, name, place)}
        if name in checkpoint.architecture.summary:
            kinds["summary"] = _find(checkpoint, SUMMARY_HEADS, name, place)
        if name in kept or not any(kinds.values()):
            continue
        own = [_sizes(kind, tensors) for kind, tensors in kinds.items()]
        joined = _join([*sizes, *own])
        if joined is None:
            log.warning(
                "%s: left out the head of %s, no MLP v2 or attn of the first's size", path, name
            )
            continue
        sizes = [joined]
        kept.append(name)
        if (teacher.get("fd_upsample_factor") or 1) > 1:
            upsample[name] = teacher["fd_upsample_factor"]
        for kind, tensors in kinds.items():
            state |= {f"heads.{name}.{_ours(kind, k)}": v for k, v in tensors.items()}
    known = {each["name"] for each in checkpoint.teachers}
    for name in checkpoint.head_names:
        if name not in known and not name.isdigit():
            log.warning("%s: left out the head of %s: it is no teacher in its args", path, name)
    found = sizes[0]._asdict() if sizes else {}
    shown = {key: value for key, value in found.items() if value is not None}
    config = HeadConfig(upsample=upsample, attention_heads=ATTN_HEADS, **shown)
    if set(kept) != set(checkpoint.architecture.class_tokens):
        config = config.model_copy(update={"only": tuple(kept)})
    return config, state


def _find(checkpoint: RadioCheckpoint, kind: str, name: str, place: int) -> dict[str, Tensor]:
    """The head of a teacher, stored under its name or, in older files, its index."""
    for prefix in (f"{kind}{name}.", f"{kind}{place}."):
        found = {k[len(prefix) :]: v for k, v in checkpoint.heads.items() if k.startswith(prefix)}
        if found:
            return found
    return {}


def _ours(kind: str, name: str) -> str:
    """A student's name, within its head of a teacher, of a weight of the format."""
    if re.match(r"blocks\.\d+\.attn\.|blocks\.\d+\.(norm|ls|mlp)", name):
        return f"attention.{name.removeprefix('blocks.')}"
    return f"{kind}.{name.removeprefix('mlp.')}"


def _join(parts: list[_Sizes | None]) -> _Sizes | None:
    """The sizes of all heads together; None if two differ or a head is of another version."""
    if None in parts:
        return None
    columns = [
        {value for value in column if value is not None}
        for column in zip(*(part for part in parts if part), strict=True)
    ]
    if any(len(values) > 1 for values in columns):
        return None
    hidden, layers, blocks = (next(iter(values), None) for values in columns)
    return _Sizes(hidden or 0, layers, blocks)


def _sizes(kind: str, state: Mapping[str, Tensor]) -> _Sizes | None:
    """The sizes of a head of version v2 or, of a map, `attn`; None for another one."""
    blocks = {k.removeprefix("blocks."): v for k, v in state.items() if k.startswith("blocks.")}
    inner = {k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")}
    if not inner or kind == "summary":
        found = _mlp2_sizes(state)
        return found and _Sizes(*found, 0 if kind == "spatial" else None)
    hidden, layers = _mlp2_sizes(inner) or (0, None)
    if layers != 0 or len(blocks) + len(inner) < len(state):
        return None
    width = inner["fc1.weight"].shape[1]
    count = len({name.partition(".")[0] for name in blocks})
    if width % ATTN_HEADS or not _fits(_meta_blocks(width, count), blocks):
        return None
    return _Sizes(hidden, None, count)


def _meta_blocks(width: int, count: int) -> torch.nn.Module:
    config = HeadConfig(attention_blocks=count, attention_heads=ATTN_HEADS)
    with torch.device("meta"):
        return attention_blocks(width, config)


def _mlp2_sizes(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Hidden channels and inner layers of an MLP of version v2; None for another head."""
    if not {"fc1.weight", "final.2.weight"} <= state.keys():
        return None
    hidden, width = state["fc1.weight"].shape
    layers = sum(re.fullmatch(r"blocks\.\d+\.2\.weight", k) is not None for k in state)
    with torch.device("meta"):
        expected = MLP2(width, len(state["final.2.weight"]), hidden_dim=hidden, num_layers=layers)
    return (hidden, layers) if _fits(expected, state) else None


def _fits(module: torch.nn.Module, state: Mapping[str, Tensor]) -> bool:
    return {k: v.shape for k, v in module.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
