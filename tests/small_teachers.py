"""Every encoder of the catalogue at toy size: its own architecture, two narrow blocks."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from teachers.build import build_teacher, parse_teacher
from teachers.catalog_rows import Row
from teachers.files import SHIPPED
from teachers.radio_models import PUBLISHED, timm
from teachers.teacher import Teacher

WIDTH, DEPTH = 32, 2
_BLOCKS = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}


def small_teacher(row: Row, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Builds a row's encoder at toy size, with random weights away from their initial symmetry.

    The CNN that ships here is small as it is, and has its own weights.

    Args:
        row: the encoder; its entry's options hold here too.
        folder: where a library's description of it is written.
        options: further keys of the entry.
    """
    if row.kind == "timm" and (SHIPPED / row.model).is_dir():
        return build_teacher(parse_teacher(row.entry | options))
    write = {"radio": _radio, "timm": _timm}.get(row.kind, _open_clip)
    model = write(row, folder, monkeypatch)
    entry = {**row.entry, "model": model, "weights": "none", **options}
    teacher: Teacher = build_teacher(parse_teacher(entry))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return teacher


def native_side(row: Row) -> int:
    """Pixels of the toy's native, square image: four patches."""
    return 4 * row.patch


def architecture_of(row: Row) -> str:
    """timm's name of a row's model, with its tag; that of a shipped one is in its config."""
    config = SHIPPED / row.model / "config.json"
    return json.loads(config.read_text())["architecture"] if config.is_file() else row.model


def _timm(row: Row, folder: Path, _: pytest.MonkeyPatch) -> str:
    _write_timm(folder, architecture_of(row), native_side(row))
    return str(folder)


def _write_timm(folder: Path, model: str, side: int) -> None:
    architecture = model.partition(".")[0]
    published = timm.get_pretrained_cfg(model)
    assert published is not None
    args: dict[str, Any] = dict(_BLOCKS)
    if architecture.startswith("davit"):
        args = {"embed_dims": [8, 8, 16, WIDTH], "depths": [1] * 4, "num_heads": [2] * 4}
    elif architecture.startswith("samvit"):
        args |= {"img_size": side, "global_attn_indexes": [1], "window_size": 3, "neck_chans": 8}
    elif architecture.startswith("naflexvit"):
        args |= {"pos_embed_grid_size": [4, 4]}
    else:
        args |= {"img_size": side}
    kept = ("mean", "std", "fixed_input_size", "first_conv", "classifier")
    cfg = {key: getattr(published, key) for key in kept}
    cfg |= {"input_size": [3, side, side], "num_classes": 0}
    config = {"architecture": architecture, "num_classes": 0, "model_args": args}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))


def _open_clip(row: Row, folder: Path, _: pytest.MonkeyPatch) -> str:
    side = native_side(row)
    if row.weights is None:  # shipped here, and small
        return row.model
    model_cfg = open_clip.get_model_config(row.model)
    tag = open_clip.get_pretrained_cfg(row.model, row.weights)
    assert model_cfg is not None
    vision_cfg: dict[str, Any] = {**model_cfg["vision_cfg"], "image_size": side}
    embed_dim = 24
    if "timm_model_name" in vision_cfg:
        _write_timm(folder, vision_cfg["timm_model_name"], side)
        vision_cfg["timm_model_name"] = "local-dir:."
        embed_dim = WIDTH
    else:
        vision_cfg |= {"layers": DEPTH, "width": WIDTH, "head_width": 16}
    stored: Mapping[str, Any] = {
        "model_cfg": {**model_cfg, "embed_dim": embed_dim, "vision_cfg": vision_cfg},
        "preprocess_cfg": {key: tag[key] for key in ("mean", "std")},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(stored))
    return str(folder)


def _radio(row: Row, _: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    architecture, side = PUBLISHED[row.model]
    small = replace(architecture, model_kwargs=dict(_BLOCKS), table_side=8)
    monkeypatch.setitem(PUBLISHED, row.model, (small, side))
    return row.model
