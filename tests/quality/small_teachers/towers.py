"""Builds and loads the vision tower of a small teacher, with open_clip."""

import json
from pathlib import Path
from typing import Any

import open_clip.model
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

SMALL = Path(__file__).parents[3] / "teachers" / "small"
PREFIX = "visual."


def load_config(folder: Path) -> dict[str, Any]:
    """The folder's `open_clip_config.json`: open_clip's `model_cfg` and `preprocess_cfg`."""
    config: dict[str, Any] = json.loads((folder / "open_clip_config.json").read_text())
    return config


def build_tower(folder: Path) -> nn.Module:
    """The vision tower that the folder's configuration describes, with random weights.

    The timm name `local-dir:.` stands for the folder itself: its `config.json` is timm's.
    """
    model = load_config(folder)["model_cfg"]
    vision = dict(model["vision_cfg"])
    if vision.get("timm_model_name") == "local-dir:.":
        vision["timm_model_name"] = f"local-dir:{folder.resolve()}"
    return open_clip.model._build_vision_tower(
        model["embed_dim"], vision, model.get("quick_gelu", False)
    )


def load_tower(folder: Path) -> nn.Module:
    """The folder's vision tower with its shipped weights, in float32 and eval mode."""
    state = load_file(folder / "open_clip_model.safetensors")
    tower = build_tower(folder)
    tower.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in state.items()})
    return tower.eval()


def encode_kept(tower: nn.Module, images: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes some of an image's patches only, as FLIP trains (Li et al., arXiv 2212.00794).

    Args:
        tower: open_clip's class-token `VisionTransformer`, or its `TimmModel` with map pooling.
        images: (B, 3, H, W), normalised.
        kept: (B, n) indices of the patches to keep, in row-major order.

    Returns:
        The image vectors (B, embed_dim) and the normalised tokens (B, n, width) of the patches.
    """
    if isinstance(tower, TimmModel):
        trunk: Any = tower.trunk
        tokens = _keep(trunk.patch_embed(images) + trunk.pos_embed, kept)
        tokens = trunk.norm(trunk.blocks(tokens))
        return trunk.attn_pool(tokens), tokens
    assert isinstance(tower, VisionTransformer)
    tokens = tower.conv1(images).flatten(2).transpose(1, 2)
    tokens = _keep(tokens + tower.positional_embedding[1:], kept)
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(len(images), 1, -1)
    tokens = tower.transformer(tower.ln_pre(torch.cat([first.to(tokens.dtype), tokens], 1)))
    tokens = tower.ln_post(tokens)
    return tokens[:, 0] @ tower.proj, tokens[:, 1:]


def _keep(tokens: Tensor, kept: Tensor) -> Tensor:
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
