"""Writes a student in the public format of the RADIO family.

https://github.com/NVlabs/RADIO (revision c0f3701) loads the file with
`radio_model(version=PATH, adaptor_names=[...])`; `distill.formats.radio_reader` reads it back. The
file is a `torch.save` of `args`, a namespace, and `state_dict`. It uses the version of the format
of RADIOv2.5 and later: a trunk with cropped position embeddings, a class token for each teacher,
registers and an optional final norm (`model_norm`), weights without reparametrization, and heads
of MLP version v2 or, with attention blocks, `attn` under the names of their teachers.

RADIO's loader builds both heads of every teacher, so a teacher without a summary gets a summary
head that returns one zero. All teachers have the type `generic`, which has no text tower.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from distill.formats.radio_heads import public_heads, refuse_heads, spatial_version
from distill.runtime.errors import RecipeError
from student.config import SHAPES, StudentConfig
from student.storage import StudentFile
from teachers.radio_architecture import TOKENS

# Names of the trunk in a student and in the format, where they differ.
_TO_PUBLIC = {
    "embedding.projection.weight": "patch_generator.embedder.weight",
    "embedding.positions": "patch_generator.pos_embed",
}

# The timm models of a student's shapes and their patch sizes; readers of the format build them.
_TIMM_NAMES = {
    SHAPES["tiny"]: ("vit_tiny_patch16_224", 16),
    SHAPES["small"]: ("vit_small_patch16_224", 16),
    SHAPES["base"]: ("vit_base_patch16_224", 16),
    SHAPES["large"]: ("vit_large_patch16_224", 16),
    SHAPES["huge"]: ("vit_huge_patch14_224", 14),
}
_NOMINAL_SIDE = 224  # pixels, of all these models

# Fields that RADIO's loader passes to `timm.create_model`, at values without effect.
UNUSED = {
    "pretrained": False,
    "in_chans": None,
    "input_size": None,
    "num_classes": 0,
    "drop": 0.0,
    "drop_path": None,
    "drop_block": None,
    "gp": None,
    "bn_momentum": None,
    "bn_eps": None,
    "torchscript": False,
    "initial_checkpoint": "",
    "spectral_reparam": False,
    "spectral_heads": False,
    "damp": None,
    "register_multiple": None,
}


def save_radio(path: Path, file: StudentFile) -> None:
    """Writes a student.

    Args:
        path: the file to write, usually `*.pth.tar`.
        file: the student. Readers of the format expect heads that return the teachers' own
            spaces, so PHI-S has to be folded into them.

    Raises:
        RecipeError: the format has no place for a part of the student.
    """
    config = file.config
    if not isinstance(config, StudentConfig):
        raise RecipeError(
            f"--format radio: is for students that are ViTs (student.kind: vit); this one is "
            f"timm's {config.model}. Use safetensors, or onnx"
        )
    if config.isolated:
        raise RecipeError(
            "--format radio: student.isolated keeps other tokens from attending to the class token "
            f"of {', '.join(config.isolated)}, which the format cannot express; use safetensors"
        )
    refuse_heads(file)
    teachers = []
    for name, target in file.targets.items():
        with_summary = target.summary_dim is not None
        teachers.append({"name": name, "type": "generic", "use_summary": with_summary})
        if config.head.upsample.get(name, 1) > 1:
            teachers[-1]["fd_upsample_factor"] = config.head.upsample[name]
    registers = config.count_registers(len(file.targets))
    args = argparse.Namespace(
        **UNUSED,
        **model_fields(config),
        model_norm=config.final_norm,
        cpe_max_size=config.max_resolution,
        cls_token_per_teacher=True,
        cpe_num_registers=registers,
        mlp_version="v2",
        spatial_mlp_version=spatial_version(file),
        dtype=next(iter(file.state_dict.values())).dtype,
        teachers=teachers,
    )
    torch.save({"args": args, "state_dict": to_public(file)}, path)


def model_fields(config: StudentConfig) -> dict[str, Any]:
    """The fields of `args` that name a timm model, and its options where the student differs."""
    shape = config.shape
    name, patch_size = _TIMM_NAMES.get(shape, _TIMM_NAMES[SHAPES["base"]])
    kwargs: dict[str, Any] = {}
    if shape not in _TIMM_NAMES:
        kwargs = {"embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads}
        kwargs["mlp_ratio"] = (shape.mlp_dim + 0.5) / shape.width  # timm truncates the product
    if config.patch_size != patch_size:
        kwargs["patch_size"] = config.patch_size
    if config.layer_scale is not None:
        kwargs["init_values"] = config.layer_scale
    if config.max_resolution == _NOMINAL_SIDE:
        # The loader does not resize a position table of the model's nominal side.
        kwargs["img_size"] = config.patch_size
    return {"model": name, "model_kwargs": kwargs}


def to_public(file: StudentFile) -> dict[str, Tensor]:
    """The tensors of a student by the format's names."""
    trunk = {
        k.removeprefix("trunk."): v for k, v in file.state_dict.items() if k.startswith("trunk.")
    }
    tokens = [trunk.pop(f"embedding.{k}", None) for k in ("class_tokens", "registers")]
    trunk["embedding.positions"] = rearrange(trunk["embedding.positions"], "y x c -> 1 (y x) c")
    state = {f"base_model.{_TO_PUBLIC.get(k, k)}": v for k, v in trunk.items()}
    state[f"base_model.{TOKENS}"] = torch.cat([each for each in tokens if each is not None])
    for key, values in (("norm_mean", file.config.mean), ("norm_std", file.config.std)):
        state[f"input_conditioner.{key}"] = torch.tensor(values).view(3, 1, 1)
    state |= public_heads(file)
    return {name: value.contiguous() for name, value in state.items()}
