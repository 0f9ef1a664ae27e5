"""vLLM's reader of RADIO, restated from a description of its rules (revision 00b5bd4).

It reads names that start with `radio_model.`, takes the geometry from a table of timm names and
from `args`, and ignores in silence whatever it has no parameter for.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

DIMENSIONS = {  # width, depth, heads, MLP width
    "vit_small_patch16_224": (384, 12, 6, 1536),
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
}
_SKIPPED = ("summary_idxs", "input_conditioner.")


class Loaded(NamedTuple):
    """The model, and the names that were skipped knowingly, and ignored in silence."""

    encode: Callable[[Tensor], Tensor]
    skipped: list[str]
    ignored: list[str]


def load(folder: Path, dimensions: Mapping[str, tuple[int, int, int, int]] = DIMENSIONS) -> Loaded:
    config = json.loads((folder / "config.json").read_text())
    args, p = config["args"], config["patch_size"]
    width, depth, heads, mlp_dim = dimensions[args["model"]]
    side = round(args["cpe_max_size"] / p)
    classes = 1
    if args["cls_token_per_teacher"]:
        classes = len({teacher["name"] for teacher in args["teachers"]})
    multiple = args["register_multiple"]
    tokens = classes + (multiple - classes % multiple if multiple else 0)
    own = {
        "patch_generator.embedder.weight": (width, 3 * p * p),
        "patch_generator.pos_embed": (1, side * side, width),
        "patch_generator.cls_token.token": (tokens, width),
    }
    for i in range(depth):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.fc1": (mlp_dim, width), "mlp.fc2": (width, mlp_dim)}
        for name, (rows, columns) in linears.items():
            own[f"blocks.{i}.{name}.weight"] = (rows, columns)
            own[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            own |= {f"blocks.{i}.{name}.{part}": (width,) for part in ("weight", "bias")}
    state, skipped, ignored = {}, [], []
    for full, value in load_file(folder / "model.safetensors").items():
        name = full.removeprefix("radio_model.")
        if full == name:
            ignored.append(full)
        elif name.startswith(_SKIPPED) or ".ls1." in name or ".ls2." in name:
            skipped.append(full)
        elif name.removeprefix("model.") in own and name.startswith("model."):
            name = name.removeprefix("model.")
            assert tuple(value.shape) == own[name], name
            state[name] = value
        else:
            ignored.append(full)
    assert state.keys() == own.keys()
    pixels = config["norm_mean"], config["norm_std"]
    return Loaded(lambda x: _encode(x, state, pixels, (p, side, depth, heads)), skipped, ignored)


def _encode(
    images: Tensor,
    state: Mapping[str, Tensor],
    pixels: tuple[list[float], list[float]],
    sizes: tuple[int, int, int, int],
) -> Tensor:
    """(B, 3, H, W) in [0, 1] to all tokens, (B, prefix + h * w, C)."""
    p, side, depth, heads = sizes
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in pixels)  # its input processor's
    patches = F.unfold((images - mean) / std, p, stride=p).transpose(1, 2)
    x = patches @ state["patch_generator.embedder.weight"].T
    h, w = images.shape[2] // p, images.shape[3] // p
    table = state["patch_generator.pos_embed"].view(1, side, side, -1).permute(0, 3, 1, 2)
    if (h, w) != (side, side):
        table = F.interpolate(table, (max(h, w),) * 2, mode="bilinear")[:, :, :h, :w]
    x = x + table.flatten(2).transpose(1, 2)
    x = torch.cat([state["patch_generator.cls_token.token"].expand(len(x), -1, -1), x], dim=1)

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for i in range(depth):
        qkv = affine(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + affine((scores @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = F.gelu(affine(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + affine(hidden, f"blocks.{i}.mlp.fc2")
    return x
