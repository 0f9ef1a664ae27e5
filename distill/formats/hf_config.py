"""The JSON files of an export for transformers: `config.json` and `preprocessor_config.json`.

`config.json` serves three kinds of readers. transformers' built-in RADIO (`model_type: radio`, in
release 5.24) reads fields of its own; vLLM and readers of RADIO's older repositories read the block
`args`, the options of RADIO's training, of which vLLM takes the shape by the name of a timm model.
"""

import math
from collections.abc import Mapping
from typing import Any

from distill.formats.radio import UNUSED, model_fields
from distill.formats.source import trained_sizes
from distill.runtime.config import parse_yaml
from student.config import SHAPES, Shape, StudentConfig
from student.storage import StudentFile

# The timm models by which vLLM knows shapes (vllm-project/vllm, revision 00b5bd4).
_VLLM = {f"vit_{size}_patch16_224": SHAPES[size] for size in ("small", "base", "large", "huge")}
_USUAL_SIDE = 512  # pixels of C-RADIO's images
_NAMED_PATCH = 16  # of the names by which RADIO's code knows shapes


def hf_config(file: StudentFile, size: tuple[int, int]) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        file: the student, without LayerScale.
        size: (height, width) in pixels of the images that it is best at.
    """
    config, names = _vit(file), list(file.targets)
    shape = config.shape
    with_summary = [i for i, t in enumerate(file.targets.values()) if t.summary_dim is not None]
    return {
        "model_type": "radio",
        "architectures": ["RadioModel"],
        "dtype": str(file.state_dict["trunk.embedding.class_tokens"].dtype).removeprefix("torch."),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "mlp_ratio": exact_ratio(shape),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "num_channels": 3,
        "patch_size": config.patch_size,
        "image_size": max(size),
        "max_img_size": config.max_resolution,
        "num_cls_tokens": len(names),
        "num_registers": config.count_registers(len(names)),
        "video_temporal_patch_size": None,
        "summary_idxs": with_summary,
        "norm_mean": list(config.mean or ()),
        "norm_std": list(config.std or ()),
        "initializer_range": 0.02,
        "preferred_resolution": list(size),
        "args": _args(file),
    }


def exact_ratio(shape: Shape) -> float:
    """The MLP ratio of which `int(width * ratio)`, as transformers computes it, is the MLP width.

    SO400M's 4304 / 1152 to four digits would give 4303.
    """
    ratio = shape.mlp_dim / shape.width
    if int(shape.width * ratio) < shape.mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    assert int(shape.width * ratio) == shape.mlp_dim, (shape, ratio)
    return ratio


def preprocessor_config(size: tuple[int, int]) -> dict[str, Any]:
    """The content of `preprocessor_config.json`.

    Images are resized to `size`, (height, width) in pixels, and rescaled to [0, 1]. The model
    normalises them itself. RADIO's own repositories do not resize; then an image whose sides are no
    multiples of the patch size fails in the model.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def best_size(file: StudentFile) -> tuple[int, int]:
    """(height, width) in pixels: the largest that a student trained at.

    Where the file does not tell, about 512 px, or the side of a smaller position table.
    """
    recipe = parse_yaml(file.metadata["recipe"], "recipe") if "recipe" in file.metadata else {}
    if trained := trained_sizes(file.metadata, recipe):
        return trained[-1]
    p = file.config.patch_size
    side = min(_vit(file).max_resolution, max(p, _USUAL_SIDE // p * p))
    return side, side


def vllm_serves(config: Mapping[str, Any]) -> bool:
    """Whether vLLM's table of shapes has that of a `config.json`, with the patches of its names."""
    shape = _VLLM.get(config["args"]["model"])
    width, depth, heads = (
        config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    own = Shape(width, depth, heads, int(width * config["mlp_ratio"]))
    return shape == own and config["patch_size"] == _NAMED_PATCH


def _args(file: StudentFile) -> dict[str, Any]:
    """The options of RADIO's training that describe the trunk; heads are in a file of ours."""
    config = _vit(file)
    registers = config.count_registers(len(file.targets))
    # vLLM does not read cpe_num_registers; this multiple gives the same number.
    multiple = len(file.targets) + registers if registers else None
    return {
        **UNUSED,
        **_model(config),
        "model_norm": False,
        "cpe_max_size": config.max_resolution,
        "cls_token_per_teacher": True,
        "register_multiple": multiple,
        "cpe_num_registers": registers,
        "mlp_version": "v2",
        "spatial_mlp_version": None,
        "teachers": [
            {"name": name, "type": "generic", "use_summary": target.summary_dim is not None}
            for name, target in file.targets.items()
        ],
    }


def _vit(file: StudentFile) -> StudentConfig:
    """The config of a student that `hf.for_hf` let pass."""
    assert isinstance(file.config, StudentConfig)
    return file.config


def _model(config: StudentConfig) -> dict[str, Any]:
    """The name of a model, by RADIO's own names where one fits; readers know no options of vLLM."""
    fields = model_fields(config)
    for size, shape in SHAPES.items():
        if config.shape == shape and config.patch_size == _NAMED_PATCH:
            kept = {k: v for k, v in fields["model_kwargs"].items() if k == "img_size"}
            return {"model": f"vit_{size}_patch{_NAMED_PATCH}_224", "model_kwargs": kept}
    return fields
