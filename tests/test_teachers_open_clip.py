"""Kind `open_clip`: towers of every construction, read by what open_clip offers of all of them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.testing import check_teacher

SIDE = 64
TOWERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain ViT": ("ViT-B-16", {"patch_size": 16, "width": 32, "head_width": 16, "layers": 2}, True),
    "CLIPA, mean of the tokens, then the norm": (
        "ViT-B-16",
        {"patch_size": 16, "width": 32, "head_width": 16, "layers": 2, "pool_type": "avg",
         "final_ln_after_pool": True},
        False,
    ),
    "CoCa, attention pool": (
        "coca_ViT-B-32",
        {"patch_size": 16, "width": 32, "head_width": 16, "layers": 2, "attn_pooler_heads": 2},
        False,
    ),
    "ResNet": ("RN50", {"width": 8, "layers": [1, 1, 1, 1]}, False),
    "timm CNN": ("convnext_base", {"timm_model_name": "convnext_atto"}, False),
    "timm ViT": ("EVA02-B-16", {"timm_model_name": "test_vit", "image_size": 160}, True),
}  # fmt: skip


def write(folder: Path, tower: str) -> str:
    """A toy of a published construction in hub layout."""
    model, sizes, _ = TOWERS[tower]
    config = open_clip.get_model_config(model)
    assert config is not None
    vision_cfg = {**config["vision_cfg"], "image_size": SIDE, **sizes}
    stored = {"model_cfg": {**config, "embed_dim": 24, "vision_cfg": vision_cfg}}
    (folder / "open_clip_config.json").write_text(json.dumps(stored))
    return str(folder)


def build(model: str, device: str | None = None, **options: Any) -> Any:
    entry = {"kind": "open_clip", "model": model, "weights": "none", **options}
    return build_teacher(parse_teacher(entry), device=device)


@pytest.mark.long
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_keeps_the_contract_and_gives_open_clips_own_embedding(
    tower: str, tmp_path: Path
) -> None:
    teacher = build(write(tmp_path, tower))
    check_teacher(teacher)
    images = torch.rand(2, 3, *teacher.spec.resolution)
    pixels = (images - teacher.mean) / teacher.std
    with torch.no_grad():
        came = teacher.visual(pixels)
        due = came[0] if isinstance(came, tuple) else came
    torch.testing.assert_close(teacher(images).summary, due)
    last = teacher.layers(images, [teacher.num_layers - 1])[0]
    torch.testing.assert_close(last, teacher(images).spatial)
    normed = TOWERS[tower][2]
    assert ("after the final norm" in teacher.spec.spatial_from) == normed


def test_a_norm_behind_the_pool_is_not_of_the_map(tmp_path: Path) -> None:
    teacher = build(write(tmp_path, "CLIPA, mean of the tokens, then the norm"))
    images = torch.rand(1, 3, SIDE, SIDE)
    pixels = (images - teacher.mean) / teacher.std
    with torch.no_grad():
        tokens = teacher.visual.transformer(teacher.visual._embeds(pixels))[:, 1:]
    due = tokens.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(teacher(images).spatial, due)


@pytest.mark.long
@pytest.mark.parametrize(
    "model, width, summary, patch, side, layers",
    [
        ("EVA02-L-14-336", 1024, 768, 14, 336, 24),
        ("convnext_large_d_320", 1536, 768, 32, 320, 4),
        ("coca_ViT-L-14", 1024, 768, 14, 224, 24),
        ("ViT-L-14-CLIPA-336", 1024, 768, 14, 336, 24),
        ("RN50x64-quickgelu", 4096, 1024, 32, 448, 5),
        ("MobileCLIP2-S4", 2048, 768, 64, 256, 5),
        ("PE-Core-L-14-336", 1024, 1024, 14, 336, 24),
        ("ViTamin-L-336", 1024, 768, 16, 336, None),
    ],
)
def test_published_towers_at_full_size_on_meta(
    model: str, width: int, summary: int, patch: int, side: int, layers: int | None
) -> None:
    teacher = build(model, device="meta")
    check_teacher(teacher)
    spec = teacher.spec
    assert (spec.spatial_dim, spec.summary_dim, spec.patch_size) == (width, summary, patch)
    assert spec.resolution == (side, side)
    assert layers is None or teacher.num_layers == layers


def test_a_tower_that_cannot_be_resized_says_so() -> None:
    with pytest.raises(TeacherError, match="ModifiedResNet takes only the size .* 224"):
        build("RN50", device="meta", resolution=[256, 256])


def test_a_tower_of_another_kind_points_here() -> None:
    entry = {"kind": "dfn_clip", "model": "EVA02-B-16", "weights": "none"}
    with pytest.raises(TeacherError, match="has a timm tower; use kind siglip or open_clip"):
        build_teacher(parse_teacher(entry), device="meta")


@pytest.mark.parametrize(
    "kind, model, summary",
    [
        ("dfn_clip", "clip_ti16_128", "embedding"),
        ("dfn_clip", "clip_ti16_128", "cls"),
        ("siglip", "siglip_ti16_128", "pool"),
    ],
)
def test_the_three_kinds_are_one_adapter(kind: str, model: str, summary: str) -> None:
    images = torch.rand(2, 3, 128, 128)
    features = [
        build_teacher(parse_teacher({"kind": each, "model": model, "summary": summary}))(images)
        for each in (kind, "open_clip")
    ]
    assert torch.equal(features[0].summary, features[1].summary)
    assert torch.equal(features[0].spatial, features[1].spatial)


def test_an_entry_without_a_summary_is_the_same_as_before_the_key_existed() -> None:
    base = {"chunk_size": None, "upsampler": None, "model": "m", "weights": None}
    base |= {"resolution": None}
    for kind, options in (
        ("open_clip", {}),
        ("siglip", {}),
        ("dfn_clip", {"summary": "embedding"}),
    ):
        config = parse_teacher({"kind": kind, "model": "m"})
        assert config.model_dump(mode="json") == {"kind": kind, **base, **options}
        assert parse_teacher(config.model_dump(mode="json")) == config
    chosen = parse_teacher({"kind": "open_clip", "model": "m", "summary": "cls"})
    assert chosen.model_dump(exclude={"chunk_size"})["summary"] == "cls"


@pytest.mark.parametrize(
    "model, summary, message",
    [("ViT-B-16-SigLIP", "cls", "timm tower"), ("ViT-B-32", "pool", "no attention pool")],
)
def test_a_summary_that_a_tower_lacks_is_refused(model: str, summary: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build(model, device="meta", summary=summary)
