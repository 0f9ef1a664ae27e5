"""A tiny random CLIP or SigLIP in open_clip's hub layout, both towers and all."""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

DIM, SIDE = 16, 16
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def write_tiny_clip(folder: Path, *, siglip_text: bool = False) -> CLIP | CustomTextCLIP:
    """Writes config and weights of `kind: dfn_clip`; returns open_clip's whole model.

    With `siglip_text` its text tower is SigLIP 2's kind: no causal mask, the last token, a bias,
    canonicalised text, and tensors named `text.*`.
    """
    text = dict(TEXT)
    if siglip_text:
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        text |= {"tokenizer_kwargs": {"clean": "canonicalize"}}
    vision = {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    model_cfg: dict[str, Any] = {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = (CustomTextCLIP if siglip_text else CLIP)(**model_cfg).eval()
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(stored))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model
