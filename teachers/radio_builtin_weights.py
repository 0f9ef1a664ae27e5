"""The weights of transformers' own RADIO model under public names.

They have the names of its class `RadioModel`, or the public ones below `radio_model.`, within whose
blocks are those of the class where the public code has none; `save_pretrained` writes either.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from teachers.errors import TeacherError
from teachers.pixels import say_conflict
from teachers.radio_architecture import EMBEDDER, TABLE, TOKENS
from teachers.radio_builtin import BuiltinConfig

_ROOT, _TRUNK = "radio_model.", "radio_model.model."
_NAMES = {
    "embeddings.patch_projection.": f"{_TRUNK}{EMBEDDER.removesuffix('weight')}",
    "embeddings.position_embedding": f"{_TRUNK}{TABLE}",
    "embeddings.cls_register_token": f"{_TRUNK}{TOKENS}",
    "encoder.layer.": f"{_TRUNK}blocks.",
    "input_conditioner.": f"{_ROOT}input_conditioner.",
    "summary_idxs": f"{_ROOT}summary_idxs",
}
_IN_BLOCKS = {
    ".attention.o_proj.": ".attn.proj.",
    ".mlp.down_proj.": ".mlp.w3.",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
}
# Tensors that the public code keeps as one, along the first axis.
_JOINED = {
    ".attn.qkv.": (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj."),
    ".mlp.w12.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def public_tensors(
    builtin: BuiltinConfig, tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The weights under their public names.

    Raises:
        TeacherError: they do not have the sizes of the config.
    """
    renamed = dict[str, Tensor]()
    for name, value in tensors.items():
        for own, public in _NAMES.items():
            if name.startswith(own):
                name = f"{public}{name.removeprefix(own)}"
        for own, public in _IN_BLOCKS.items():
            name = name.replace(own, public) if name.startswith(f"{_TRUNK}blocks.") else name
        renamed[name] = value
    for joined, parts in _JOINED.items():
        for name in [name for name in renamed if parts[0] in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if all(each in renamed for each in names):
                together = torch.cat([renamed.pop(each) for each in names])
                renamed[name.replace(parts[0], joined)] = together
    stated = {"mean": builtin.norm_mean, "std": builtin.norm_std}
    for key, colour in stated.items():
        name = f"{_ROOT}input_conditioner.norm_{key}"
        taken = renamed.setdefault(name, torch.tensor(colour).view(3, 1, 1)).flatten().tolist()
        say_conflict(f"weights {path}", {key: taken}, "its tensors", stated, "its config.json")
    _check_sizes(builtin, renamed, path)
    return _with_scales(builtin, renamed)


def _check_sizes(builtin: BuiltinConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    width, patch = builtin.hidden_size, builtin.patch_size
    prefix = builtin.num_cls_tokens + builtin.num_registers
    first = "w3" if builtin.use_swiglu_ffn else "fc2"
    sizes = {
        EMBEDDER: ("hidden_size and patch_size", (width, 3 * patch**2)),
        TABLE: ("max_img_size and patch_size", (1, builtin.table_side**2, width)),
        TOKENS: ("num_cls_tokens and num_registers", (prefix, width)),
        f"blocks.0.mlp.{first}.weight": ("mlp_ratio", (width, builtin.mlp_dim)),
    }
    for name, (keys, due) in sizes.items():
        came = tensors.get(f"{_TRUNK}{name}")
        if came is not None and came.shape != due:
            raise TeacherError(
                f"{path}: {name} has the shape {tuple(came.shape)}, but {keys} of its config.json "
                f"{'make' if ' and ' in keys else 'makes'} it {due}"
            )
    blocks = f"{_TRUNK}blocks."
    found = {k.removeprefix(blocks).split(".")[0] for k in tensors if k.startswith(blocks)}
    depth = builtin.num_hidden_layers
    if found != set(map(str, range(depth))):
        raise TeacherError(
            f"{path} has {len(found)} blocks, but num_hidden_layers of its config.json is {depth}"
        )


def _with_scales(builtin: BuiltinConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with every LayerScale or none: transformers fills in those that are missing."""
    names = [
        f"{_TRUNK}blocks.{i}.ls{n}.gamma" for i in range(builtin.num_hidden_layers) for n in (1, 2)
    ]
    missing = torch.full((builtin.hidden_size,), builtin.layerscale_value)
    spelt = {name: name.replace(".gamma", ".grandma") for name in names}  # as on the hub
    scales = {name: tensors.get(name, tensors.get(spelt[name], missing)) for name in names}
    rest = {k: v for k, v in tensors.items() if k not in scales and k not in spelt.values()}
    # A scale of one changes no bit, and a model without LayerScale is written with it.
    if all(bool((value == 1).all()) for value in scales.values()):
        return rest
    return rest | scales
