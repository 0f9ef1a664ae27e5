"""The published models of the RADIO family, and the network of a RADIO architecture.

The network is timm's NaFlexVit, which has RADIO's position embedding (CPE) as an option: the table
is resized bilinearly to a square of the grid's longer side, without antialiasing and with
half-pixel centres, and cropped top left. timm notes that the hub's own code for C-RADIOv3-B and -H
aligns corners instead; the public loader, which is followed here, does so for no model.
"""

import re
from typing import Any

import timm
from timm.models.naflexvit import NaFlexVit
from torch import nn

from teachers.errors import TeacherError
from teachers.messages import did_you_mean
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from teachers.radio_architecture import RadioArchitecture
from teachers.weights import seeded, shorten

# Width, depth, heads and MLP ratio of the names that the public code adds to timm's.
_SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 4304 / 1152),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1536, 40, 24, 4.0),
    "bigG": (1664, 48, 16, 8192 / 1664),
}
# The `model_kwargs` that a checkpoint may have: shapes, and what follows from its tensors.
_SHAPES = {"embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"}
_OVERRIDDEN = {
    *("img_size", "patch_size", "init_values", "class_token", "reg_tokens", "no_embed_class"),
    *("dynamic_img_size", "num_classes", "drop_rate", "drop_path_rate"),
}
_SIZED_NAME = re.compile(rf"vit_({'|'.join(_SIZES)})_patch(14|16)(_v2)?_224")


def _published(
    model: str, teachers: tuple[str, ...], registers: int, **changes: Any
) -> RadioArchitecture:
    """A model of the family. The last teacher, SAM, has a class token but no summary."""
    values: dict[str, Any] = {
        "model": model,
        "model_kwargs": {},
        "patch_size": 16,
        "table_side": 128,
        "class_tokens": teachers,
        "summary": teachers[:-1],
        "registers": registers,
        "final_norm": False,
        "layer_scale": False,
        "patch_bias": False,
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
    }
    return RadioArchitecture(**values | changes)


_V2_5 = ("clip", "siglip", "dino_v2", "sam")
_V3 = ("clip", "siglip2-g", "dino_v2", "sam")
_V4 = ("siglip2-g", "dino_v3", "sam3")
_DINO = {
    "patch_size": 14,
    "layer_scale": True,
    "patch_bias": True,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}
# With the side in pixels of the intended resolution. v3 and v4 as in timm; for v2.5 the number of
# registers and the missing LayerScale of B and L are assumptions, as is the order of v4's teachers.
# Random weights and the meta device use this table, and so do the names of class tokens in
# transformers' layout, which has none; else a file contains its own architecture.
PUBLISHED: dict[str, tuple[RadioArchitecture, int]] = {
    "radio_v2.5-b": (_published("vit_base_patch16_224", _V2_5, 4), 768),
    "radio_v2.5-l": (_published("vit_large_patch16_224", _V2_5, 4), 768),
    "radio_v2.5-h": (_published("vit_huge_patch16_224", _V2_5, 4), 768),
    "radio_v2.5-g": (_published("vit_giant_patch14_reg4_dinov2", _V2_5, 4, **_DINO), 896),
    "c-radio_v3-b": (_published("vit_base_patch16_v2_224", _V3, 4, layer_scale=True), 512),
    "c-radio_v3-l": (_published("vit_large_patch16_v2_224", _V3, 4, layer_scale=True), 512),
    "c-radio_v3-h": (_published("vit_huge_patch16_224", _V3, 4), 512),
    "c-radio_v3-g": (_published("vit_giant_patch16_224", _V3, 4), 512),
    "c-radio_v4-so400m": (_published("vit_so400m_patch16_224", _V4, 7), 512),
    "c-radio_v4-h": (_published("vit_huge_patch16_224", _V4, 7), 512),
}


def build_trunk(architecture: RadioArchitecture) -> NaFlexVit:
    """The network of an architecture, with random weights from a fixed seed.

    Raises:
        TeacherError: the model is neither in timm nor of the family, or is not a plain ViT.
    """
    name, kwargs = _timm_model(architecture)
    side = architecture.table_side
    options = {
        "use_naflex": True,
        "num_classes": 0,
        "global_pool": "token",
        "fc_norm": False,
        "final_norm": architecture.final_norm,
        "init_values": 1e-5 if architecture.layer_scale else None,
        "patch_size": architecture.patch_size,
        "patchify_channels_last": False,
        "class_token": True,
        "reg_tokens": len(architecture.class_tokens) + architecture.registers - 1,
        "pos_embed_grid_size": (side, side),
        "pos_embed_interp_mode": "bilinear",
        "pos_embed_ar_preserving": True,
        "pos_embed_antialias": False,
    }
    try:
        with seeded():
            network = timm.create_model(name, **kwargs | options)
    except (TypeError, AssertionError) as error:
        raise TeacherError(f"model: timm's {name!r} is not a ViT: {shorten(str(error))}") from None
    if not isinstance(network, NaFlexVit) or network.rope is not None:
        raise TeacherError(f"model: timm's {name!r} is not a ViT with a position table")
    if not architecture.layer_scale:  # timm leaves out an option that is None, and names imply one
        for block in network.blocks:
            block.ls1 = block.ls2 = nn.Identity()
    if not architecture.patch_bias:
        network.embeds.proj.register_parameter("bias", None)
    return network


def _timm_model(architecture: RadioArchitecture) -> tuple[str, dict[str, Any]]:
    """timm's name of the model, and the options that the name does not imply."""
    model, given = architecture.model, architecture.model_kwargs
    unknown = sorted(set(given) - _SHAPES - _OVERRIDDEN)
    if unknown:
        raise TeacherError(
            f"model_kwargs: {', '.join(unknown)} of {model!r} is not supported; known are "
            f"{', '.join(sorted(_SHAPES | _OVERRIDDEN))}"
        )
    chosen = {key: value for key, value in given.items() if key in _SHAPES}
    if timm.is_model(model) and ":" not in model:
        return model, chosen
    sized = _SIZED_NAME.fullmatch(model)
    if sized is None:
        raise TeacherError(
            f"model: {model!r} of the checkpoint is neither a timm model"
            f"{did_you_mean(model, timm.list_models('vit_*'))} nor vit_SIZE_patchP_224 or "
            f"vit_SIZE_patchP_v2_224 with SIZE one of {', '.join(_SIZES)}"
        )
    width, depth, heads, ratio = _SIZES[sized[1]]
    named = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": ratio}
    return "vit_base_patch16_224", named | chosen
