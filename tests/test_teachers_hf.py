"""Vision models of transformers: what is read of them, from folders that the library wrote."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.testing import check_teacher

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="the extra [hf], transformers, is not installed"
)
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
TEXT |= {"intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def build(folder: Path, device: str | None = None, **options: Any) -> Any:
    return build_teacher(
        parse_teacher({"kind": "hf", "model": str(folder), **options}), device=device
    )


def write(folder: Path, model_class: str, config_class: str, **sizes: Any) -> Any:
    """A tiny random model in hub layout; returns it."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes)
    model_of = getattr(transformers, model_class)
    model = model_of.from_config(config) if model_class == "AutoModel" else model_of(config)
    model.save_pretrained(folder)
    preprocessor = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model.eval()


FAMILIES = {
    "ViT": ("ViTConfig", VIT, 1, "pooler_output", (4, 4)),
    "CLIP": ("CLIPVisionConfig", VIT, 1, "pooler_output", (4, 4)),
    "SigLIP": ("SiglipVisionConfig", VIT, 0, "pooler_output", (4, 4)),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", VIT, 5, "pooler_output", (4, 4)),
    "DINOv3": ("DINOv3ViTConfig", VIT | {"num_register_tokens": 4}, 5, "pooler_output", (4, 4)),
    "Swin": (
        "SwinConfig",
        {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4},
        *(0, "pooler_output", (16, 16)),
    ),
    "ConvNeXt": (
        "ConvNextConfig",
        {"image_size": 64, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
        *(None, "pooler_output", (2, 2)),
    ),
    "SAM": (
        "SamVisionConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
         "patch_size": 8, "output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [1],
         "window_size": 3},
        *(None, "", (8, 8)),
    ),
}  # fmt: skip


@needs_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_at_its_last_hidden_state(family: str, tmp_path: Path) -> None:
    config_class, sizes, prefix, summary_from, grid = FAMILIES[family]
    model = write(tmp_path, "AutoModel", config_class, **sizes)
    teacher = build(tmp_path)
    check_teacher(teacher)
    assert teacher.spec.spatial_from == f"last_hidden_state of {type(model).__name__}"
    assert teacher.spec.summary_from == summary_from
    images = torch.rand(2, 3, *teacher.spec.resolution)
    with torch.no_grad():
        pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        due = model(pixel_values=pixels)
    hidden = due.last_hidden_state
    if prefix is not None:
        hidden = hidden[:, prefix:].transpose(1, 2).unflatten(2, grid)
    features = teacher(images)
    assert features.spatial.shape[2:] == grid
    torch.testing.assert_close(features.spatial, hidden)
    if summary_from:
        torch.testing.assert_close(features.summary, due.pooler_output)


@needs_transformers
def test_a_row_of_the_hub_at_full_size_on_meta(tmp_path: Path) -> None:
    from transformers import Dinov2Config

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    Dinov2Config(**sizes, image_size=518, patch_size=14).save_pretrained(tmp_path)
    preprocessor = json.dumps({"image_mean": MEAN, "image_std": STD})
    (tmp_path / "preprocessor_config.json").write_text(preprocessor)
    teacher = build(tmp_path, device="meta")
    check_teacher(teacher)
    assert (teacher.spec.spatial_dim, teacher.spec.summary_dim) == (1024, 1024)
    assert teacher.spec.grid(518, 518) == (37, 37)
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(304.4, abs=0.1)


@needs_transformers
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_vision_tower_of_a_whole_model_is_found_and_loaded(family: str, tmp_path: Path) -> None:
    whole = write(
        tmp_path, f"{family}Model", f"{family}Config", vision_config=VIT, text_config=TEXT
    )
    teacher = build(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        due = whole.vision_model(pixel_values=(images - teacher.mean) / teacher.std)
    torch.testing.assert_close(teacher(images).summary, due.pooler_output)
    random = build(tmp_path, weights="none")
    assert not torch.allclose(random(images).summary, due.pooler_output, atol=1e-3)


@needs_transformers
def test_positions_are_interpolated_where_the_recipe_says_so(tmp_path: Path) -> None:
    model = write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    teacher = build(tmp_path, resolution=[32, 48])
    check_teacher(teacher)
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        pixels = (images - teacher.mean) / teacher.std
        due = model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(images).spatial, due.transpose(1, 2).unflatten(2, (4, 6)))


@needs_transformers
def test_a_pooler_that_the_weights_lack_is_not_the_summary(tmp_path: Path) -> None:
    write(tmp_path, "ViTForImageClassification", "ViTConfig", **VIT)
    teacher = build(tmp_path)
    assert teacher.spec.summary_from == "first token"
    with pytest.raises(TeacherError, match=r"summary: .* has no pool; choose cls, none"):
        build(tmp_path, summary="pool")


@needs_transformers
@pytest.mark.parametrize(
    "config_class, sizes, options, message",
    [
        (
            "ViTMAEConfig",
            VIT,
            {},
            "returns 5 tokens for 32 x 32 px, which is not a grid of patches",
        ),
        ("ResNetConfig", {"depths": [1, 1, 1, 1]}, {}, "resolution: missing; the config of"),
        (
            "Siglip2VisionConfig",
            {k: v for k, v in VIT.items() if k != "image_size"},
            {"resolution": [64, 64]},
            r"\(Siglip2VisionConfig\) returns no last_hidden_state for images of 64 x 64 px alone",
        ),
    ],
)
def test_a_model_that_gives_no_map_is_refused_in_words(
    config_class: str, sizes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, "AutoModel", config_class, **sizes)
    with pytest.raises(TeacherError, match=message):
        build(tmp_path, **options)


@needs_transformers
def test_weights_or_pixels_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("layernorm.weight"))
    save_file({k: v for k, v in tensors.items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(
        TeacherError, match="lacks 1 tensors of its ViTModel, such as layernorm.weight"
    ):
        build(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(TeacherError, match="states no mean, and there is none to assume"):
        build(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(TeacherError, match="model: preprocessor_config.json of"):
        build(tmp_path)


@needs_transformers
def test_a_missing_download_says_the_command() -> None:
    with pytest.raises(TeacherError, match="run `hf download org/no-such-model --local-dir DIR`"):
        build(Path("org/no-such-model"))


@needs_transformers
def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(TeacherError, match="model: config.json of .*custom code"):
        build(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TeacherError, match=r"pip install 'featsharp-distill\[hf\]'"):
        build(Path("org/name"))


def preprocessor(folder: Path, **content: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@needs_transformers
@pytest.mark.parametrize(
    "content, mean, std",
    [
        ({"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [25.5] * 3}, 0.2, 0.1),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3}, 0.5, 0.5),
        (
            {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
            *(0.5, 0.5),
        ),
        ({"do_normalize": False, "image_mean": MEAN, "image_std": STD}, 0, 1),
        ({"do_normalize": False, "do_rescale": False}, 0, 1 / 255),
    ],
)
def test_what_precedes_the_normalisation_counts(
    content: dict[str, Any], mean: float, std: float, tmp_path: Path
) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    preprocessor(tmp_path, **content)
    own = build(tmp_path).normalization
    assert own[0] == pytest.approx([mean] * 3)
    assert own[1] == pytest.approx([std] * 3)


@needs_transformers
def test_an_image_processors_own_defaults_stand_for_what_its_config_leaves_out(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    preprocessor(tmp_path, image_processor_type="SiglipImageProcessor")
    assert build(tmp_path).normalization == ((0.5,) * 3, (0.5,) * 3)
    (line,) = said()
    assert line.startswith(f"hf {tmp_path}: mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5] assumed")
    assert "the default of SiglipImageProcessor" in line


@needs_transformers
def test_a_model_that_takes_blue_first_gets_it(tmp_path: Path) -> None:
    from transformers import MobileViTImageProcessor

    model = write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    MobileViTImageProcessor().save_pretrained(tmp_path)  # states a mean that it does not use
    teacher = build(tmp_path, resolution=[32, 32])
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        due = model(pixel_values=images.flip(1)).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(images).spatial.flatten(2).transpose(1, 2), due)


@needs_transformers
def test_a_size_is_the_configs_and_else_the_preprocessors(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    pixels = {"image_mean": MEAN, "image_std": STD}
    vit, resnet = tmp_path / "vit", tmp_path / "resnet"
    write(vit, "AutoModel", "ViTConfig", **VIT)
    preprocessor(vit, **pixels, size={"shortest_edge": 48}, crop_size={"height": 24, "width": 24})
    assert build(vit).spec.resolution == (32, 32)
    (line,) = said()
    assert "resolution [32, 32], the image_size of its config" in line
    assert "states [24, 24]" in line
    sizes = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
    write(resnet, "AutoModel", "ResNetConfig", **sizes, layer_type="basic")
    preprocessor(resnet, **pixels, size={"height": 64, "width": 96})
    assert build(resnet).spec.resolution == (64, 96)
    assert said() == []


@needs_transformers
def test_safetensors_beside_other_weights_are_said_to_be_taken(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    model = write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    other = {name: value * 0 for name, value in model.state_dict().items()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    assert build(tmp_path).network.state_dict()["layernorm.weight"].any()
    (line,) = said()
    assert "took model.safetensors of [model.safetensors, pytorch_model.bin]" in line
    assert "transformers' choice" in line


@needs_transformers
def test_an_entrys_pixels_stand_for_what_nobody_states(tmp_path: Path) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    preprocessor(tmp_path)
    teacher = build(tmp_path, mean=MEAN, std=STD)
    assert teacher.normalization == (tuple(MEAN), tuple(STD))


@needs_transformers
@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "preprocessor_config.json of .*(mapping|list)"),
        ({"rescale_factor": 0}, "rescale_factor: expected above 0, got 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected above 0, got '1/255'"),
        ({"image_mean": "half"}, "mean: expected three numbers"),
        ({"image_mean": [127.5] * 3}, r"mean: is for images in \[0, 1\]"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order and do_normalize"),
    ],
)
def test_a_preprocessing_that_cannot_be_is_one_message(
    content: Any, message: str, tmp_path: Path
) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    if isinstance(content, dict):
        content = {"image_mean": MEAN, "image_std": STD} | content
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(TeacherError, match=message):
        build(tmp_path)


@needs_transformers
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_one_message(name: str, tmp_path: Path) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(TeacherError, match=f"model: the weights of {tmp_path}: "):
        build(tmp_path)


@needs_transformers
def test_the_newer_of_two_preprocessing_files_is_said_to_be_taken(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    write(tmp_path, "AutoModel", "ViTConfig", **VIT)
    newer = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    assert build(tmp_path).normalization == ((0.5,) * 3, (0.5,) * 3)
    (line,) = said()
    assert "took processor_config.json of [processor_config.json, preprocessor_config" in line
