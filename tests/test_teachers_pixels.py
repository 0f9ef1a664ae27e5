"""The source of the weights states their normalisation, size and activation; or it is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from distill.benchmarks.classification.text_side import TextConfig, load_text_tower
from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.normalization import IMAGENET_MEAN, OPENAI_MEAN, OPENAI_STD
from teachers.text_tower import TextTower, TextTowerConfig
from teachers.timm_source import timm
from tests.tiny_clip import SIDE, write_tiny_clip

Said = Callable[[], list[str]]
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
TIMM = "vit_tiny_patch16_224"


def build(device: str | None = None, **entry: Any) -> Any:
    return build_teacher(parse_teacher(entry), device=device)


def pixels(teacher: Any) -> tuple[list[float], list[float]]:
    mean, std = teacher.normalization
    return list(mean), list(std)


def clip(folder: Path, **changes: Any) -> str:
    """A tiny CLIP in hub layout with its own normalisation; `changes` are those of its config."""
    write_tiny_clip(folder)
    path = folder / "open_clip_config.json"
    stored = json.loads(path.read_text())
    stored["preprocess_cfg"] = {"mean": MEAN, "std": STD} | changes.pop("preprocess_cfg", {})
    stored["model_cfg"] |= changes
    path.write_text(json.dumps(stored))
    return str(folder)


@pytest.fixture
def small_b16(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's ViT-B-16 with and without QuickGELU and its ViT-L-14, tiny."""
    from open_clip import factory

    text = {"context_length": 16, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    small = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    for name in ("ViT-B-16", "ViT-L-14"):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, small)
    quick = small | {"quick_gelu": True}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-16-quickgelu", quick)


@pytest.mark.parametrize("name", ["{}", "local-dir:{}"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_folders_own_pixels_decide_by_every_name(
    name: str, beside: bool, tmp_path: Path, said: Said
) -> None:
    folder = clip(tmp_path / "clip")
    entry = {"weights": f"{folder}/open_clip_model.safetensors"} if beside else {}
    teacher = build(kind="open_clip", model=name.format(folder), **entry)
    assert pixels(teacher) == (MEAN, STD)
    assert said() == []
    images = torch.rand(2, 3, SIDE, SIDE)
    own = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        due = own.encode_image((images - teacher.mean) / teacher.std)
    torch.testing.assert_close(teacher(images).summary, due)


def test_a_repository_of_the_hub_states_its_pixels_and_brings_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    folder = Path(clip(tmp_path / "clip"))
    fetched = []

    def hub(model_id: str, filename: str | None = None, **_: Any) -> str:
        fetched.append((model_id, filename))
        return str(folder / (filename or "open_clip_model.safetensors"))

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", hub)
    monkeypatch.setattr("teachers.open_clip_source.download_pretrained_from_hf", hub)
    teacher = build(kind="open_clip", model="hf-hub:org/name")
    assert pixels(teacher) == (MEAN, STD)
    assert fetched == [("org/name", "open_clip_config.json"), ("org/name", None)]
    file = str(folder / "open_clip_model.safetensors")
    again = build(kind="open_clip", model="hf-hub:org/name", weights=file)
    assert pixels(again) == (MEAN, STD)
    assert said() == []


def test_a_repository_that_is_not_here_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match=r"hf download org/name --include .*path as model"):
        build(kind="open_clip", model="hf-hub:org/name")


@pytest.mark.usefixtures("small_b16")
def test_the_config_beside_the_weights_decides_under_a_name_of_open_clip(
    tmp_path: Path, said: Said
) -> None:
    folder = clip(tmp_path / "clip")
    file = f"{folder}/open_clip_model.safetensors"
    for weights in (folder, file):
        teacher = build(kind="open_clip", model="ViT-B-16", weights=weights)
        assert pixels(teacher) == (MEAN, STD)
    assert said() == []


@pytest.mark.usefixtures("small_b16")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quick_gelu": True}, "states quick_gelu True, but model 'ViT-B-16' has False"),
        (
            {"vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 4,
                            "patch_size": 8}},
            "states vision_cfg.head_width 4, but model 'ViT-B-16' has 8",
        ),
    ],
)  # fmt: skip
def test_a_config_beside_the_weights_of_another_model_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = clip(tmp_path / "clip", **changes)
    with pytest.raises(TeacherError, match=message):
        build(kind="open_clip", model="ViT-B-16", weights=folder)


@pytest.mark.usefixtures("small_b16")
def test_a_bare_file_under_a_name_of_open_clip_says_what_was_assumed(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(clip(tmp_path / "clip"))
    (folder / "open_clip_config.json").unlink()
    file = str(folder / "open_clip_model.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["openai"])
    teacher = build(kind="open_clip", model="ViT-B-16", weights=file)
    assert pixels(teacher) == (list(OPENAI_MEAN), list(OPENAI_STD))
    activation, assumed = said()
    assert activation.startswith("open_clip ViT-B-16: activation GELU assumed")
    assert "ViT-B-16-quickgelu has the other one" in activation
    assert assumed.startswith("open_clip ViT-B-16: mean [0.4815, 0.4578, 0.4082] and std [0.2686")
    assert "published for ViT-B-16" in assumed
    assert file in assumed
    build(kind="open_clip", model="ViT-B-16", weights=file)
    assert said() == []  # once


@pytest.mark.usefixtures("small_b16")
def test_where_published_weights_differ_nothing_is_assumed_and_an_entry_decides(
    tmp_path: Path, said: Said
) -> None:
    folder = Path(clip(tmp_path / "clip"))
    (folder / "open_clip_config.json").unlink()
    tags = open_clip.list_pretrained_tags_by_model("ViT-L-14")
    assert len({open_clip.get_pretrained_cfg("ViT-L-14", tag)["mean"] for tag in tags}) > 1
    entry = {"kind": "open_clip", "model": "ViT-L-14", "weights": str(folder)}
    with pytest.raises(TeacherError, match="ViT-L-14.*states no mean, and there is none to assume"):
        build(**entry)
    teacher = build(**entry, mean=MEAN, std=STD)
    assert pixels(teacher) == (MEAN, STD)
    assert not any("mean" in line for line in said())


def test_an_entry_overrules_its_source_and_the_conflict_is_said(tmp_path: Path, said: Said) -> None:
    folder = clip(tmp_path / "clip")
    teacher = build(kind="open_clip", model=folder, mean=[0.5] * 3, std=STD)
    assert pixels(teacher) == ([0.5] * 3, STD)
    (line,) = said()
    assert line.startswith(f"open_clip {folder}: mean [0.5, 0.5, 0.5] of the entry is taken; ")
    assert line.endswith("open_clip_config.json states [0.1, 0.2, 0.3]")


@pytest.mark.parametrize(
    "preprocess, message",
    [
        ({"mean": [123.7, 116.3, 103.5]}, r"mean: is for images in \[0, 1\], got .*by 255"),
        ({"std": [0.2, 0.2, 0]}, "std: must be positive"),
        ({"mean": [0.5, 0.5]}, "mean: expected three numbers"),
        ({"mean": "half"}, "mean: expected three numbers"),
    ],
)
def test_what_is_no_normalisation_is_refused_in_a_source_and_in_an_entry(
    preprocess: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = clip(tmp_path / "clip", preprocess_cfg=preprocess)
    with pytest.raises(TeacherError, match=message):
        build(kind="open_clip", model=folder)
    with pytest.raises(TeacherError, match="mean|std"):
        parse_teacher({"kind": "open_clip", "model": folder, **preprocess})
    assert pixels(build(kind="open_clip", model=folder, mean=MEAN, std=STD)) == (MEAN, STD)


def test_a_config_that_states_half_or_null_leaves_the_rest_to_be_said(
    tmp_path: Path, said: Said
) -> None:
    folder = clip(tmp_path / "clip", preprocess_cfg={"std": None})
    teacher = build(kind="open_clip", model=folder)
    assert pixels(teacher) == (MEAN, list(OPENAI_STD))
    (line,) = said()
    assert "std [0.2686, 0.2613, 0.2758] assumed, open_clip's default (OpenAI's)" in line


def test_a_config_beside_the_weights_wins_over_that_of_the_models_folder(
    tmp_path: Path, said: Said
) -> None:
    one, other = (
        clip(tmp_path / name, preprocess_cfg={"mean": mean})
        for name, mean in (("one", MEAN), ("other", [0.5] * 3))
    )
    assert pixels(build(kind="open_clip", model=one, weights=other)) == ([0.5] * 3, STD)
    (line,) = said()
    assert f"mean [0.5, 0.5, 0.5] of {other}/open_clip_config.json is taken; {one}/" in line


def test_a_size_that_the_tower_does_not_have_is_said(tmp_path: Path, said: Said) -> None:
    folder = clip(tmp_path / "clip", preprocess_cfg={"size": 32})
    assert build(kind="open_clip", model=folder).spec.resolution == (SIDE, SIDE)
    (line,) = said()
    assert f"resolution [{SIDE}, {SIDE}], that of the tower" in line
    assert "states [32, 32]" in line
    build(kind="open_clip", model=folder, resolution=[24, 24])
    assert said() == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_dim": None}, "model_cfg has no embed_dim"),
        ({"vision_cfg": {"new_option": 1}}, "vision_cfg: .*new_option.*later open_clip"),
    ],
)
def test_a_config_that_describes_no_model_is_one_message(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = clip(tmp_path / "clip", **changes)
    with pytest.raises(TeacherError, match=message):
        build(kind="open_clip", model=folder)


@pytest.mark.parametrize(
    "vision, message",
    [
        ({"timm_model_name": "no_such_model"}, "builds no tower of .*Unknown model"),
        ({"timm_model_name": "hf-hub:org/name"}, "builds no tower of .*LocalEntryNotFoundError"),
        ({"patch_size": 0}, "builds no tower of .*ZeroDivisionError"),
    ],
)
def test_a_tower_that_cannot_be_built_is_one_message(
    vision: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = clip(tmp_path / "clip", vision_cfg=vision)
    with pytest.raises(TeacherError, match=message):
        build(kind="open_clip", model=folder)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"model": "vit_tiny_patch16_224.augreg_in21"}, "no tag of .*did you mean .*augreg_in21k'"),
        ({"model": "hf-hub:org/name", "resolution": [64, 64]}, "hf download org/name .* as model"),
        ({"model": "zoo:name"}, "Unknown model source 'zoo'"),
    ],
)
@pytest.mark.parametrize("weights", [None, "none"])
def test_a_name_that_timm_does_not_know_is_one_message(
    entry: dict[str, Any], weights: str | None, message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        build(kind="timm", weights=weights, **entry)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "no_such_model"}, r"Unknown model \(no_such_model\)"),
        ({"architecture": TIMM, "pretrained_cfg": {"new_option": 1}}, "argument 'new_option'"),
        ({"architecture": TIMM, "model_args": {"new_option": 1}, "pretrained_cfg": {}}, "new_opt"),
    ],
)
def test_a_config_that_timm_does_not_understand_is_one_message(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match=message):
        build(kind="timm", model=str(tmp_path), weights="none")


def test_a_tower_is_never_initialised_from_a_download(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": True, "image_size": 160}
    folder = clip(tmp_path / "clip", vision_cfg=vision)
    assert build(kind="open_clip", model=folder, weights="none").spec.resolution == (160, 160)


def timm_file(folder: Path, **config: Any) -> str:
    """A file of a tiny timm ViT, with timm's config beside it if `config` is given."""
    folder.mkdir()
    network = timm.create_model(TIMM, depth=1)
    save_file(network.state_dict(), folder / "model.safetensors")
    if config:
        cfg = {"num_classes": 1000, **config.pop("pretrained_cfg", {})}
        stored = {"architecture": TIMM, "model_args": {"depth": 1}, "pretrained_cfg": cfg, **config}
        (folder / "config.json").write_text(json.dumps(stored))
    return str(folder / "model.safetensors")


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's ViTs of one block."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **{"depth": 1} | k))


@pytest.mark.usefixtures("shallow")
def test_a_bare_file_under_a_name_of_timm_says_whose_pixels_were_assumed(
    tmp_path: Path, said: Said
) -> None:
    file = timm_file(tmp_path / "timm")
    assert pixels(build(kind="timm", model=TIMM, weights=file)) == ([0.5] * 3, [0.5] * 3)
    (line,) = said()
    assert line.startswith(f"timm {TIMM}: mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5] assumed")
    assert f"that of timm's {TIMM}.augreg_in21k_ft_in1k" in line
    assert file in line
    build(kind="timm", model=TIMM, weights=file, mean=MEAN, std=STD)
    build(kind="timm", model=f"{TIMM}.augreg_in21k", weights=file)  # the tag states them
    build(kind="timm", model=TIMM, weights="none")
    assert said() == []


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("place", ["file", "folder"])
def test_the_config_beside_the_weights_decides_under_a_name_of_timm(
    place: str, tmp_path: Path, said: Said
) -> None:
    cfg = {"mean": MEAN, "std": STD, "input_size": [3, 224, 224]}
    file = timm_file(tmp_path / "timm", pretrained_cfg=cfg)
    weights = file if place == "file" else str(Path(file).parent)
    teacher = build(kind="timm", model=f"{TIMM}.augreg_in21k", weights=weights)
    assert pixels(teacher) == (MEAN, STD)
    by_folder = build(kind="timm", model=str(Path(file).parent))
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(teacher(images).spatial, by_folder(images).spatial)
    lines = said()
    assert [line.split(": ")[1].split(" of ")[0] for line in lines] == [
        "mean [0.1, 0.2, 0.3]",
        "std [0.4, 0.5, 0.6]",
    ]
    assert all(f"timm's {TIMM}.augreg_in21k states [0.5, 0.5, 0.5]" in line for line in lines)


def test_a_name_whose_published_weights_differ_says_that_too(tmp_path: Path, said: Said) -> None:
    network = timm.create_model("vit_base_patch16_224", depth=1)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"tag": "me"}}))
    build(kind="timm", model="vit_base_patch16_224", weights=str(tmp_path))
    (line,) = said()
    assert "vit_base_patch16_224.augreg2_in21k_ft_in1k though other weights of that" in line


def test_a_config_beside_the_weights_of_another_architecture_is_refused(tmp_path: Path) -> None:
    file = timm_file(tmp_path / "timm", architecture="vit_small_patch16_224")
    with pytest.raises(TeacherError, match=f"architecture 'vit_small_patch16_224'.*is '{TIMM}'"):
        build(kind="timm", model=TIMM, weights=file)


def test_a_folder_of_timm_that_states_no_pixels_says_so(tmp_path: Path, said: Said) -> None:
    folder = str(Path(timm_file(tmp_path / "timm", pretrained_cfg={"tag": "mine"})).parent)
    teacher = build(kind="timm", model=folder)
    assert pixels(teacher)[0] == list(IMAGENET_MEAN)
    (line,) = said()
    assert line.startswith(f"timm {folder}: mean [0.485, 0.456, 0.406]")
    assert "assumed, timm's default (ImageNet's)" in line


def test_a_folder_that_is_not_timms_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTModel"]}))
    with pytest.raises(TeacherError, match="config.json names no architecture of timm"):
        build(kind="timm", model=str(tmp_path))
    with pytest.raises(TeacherError, match="config.json is missing"):
        build(kind="timm", model=f"local-dir:{tmp_path / 'nowhere'}")


def test_an_entry_without_pixels_is_dumped_as_before_the_keys_existed() -> None:
    for kind in ("timm", "open_clip", "dfn_clip", "siglip", "hf"):
        config = parse_teacher({"kind": kind, "model": "m"})
        assert not {"mean", "std"} & config.model_dump(mode="json").keys()
        set_here = parse_teacher({"kind": kind, "model": "m", "mean": MEAN, "std": STD})
        assert set_here.model_dump(mode="json")["mean"] == MEAN
        assert parse_teacher(set_here.model_dump()) == set_here


def test_tokenizer_files_that_are_not_read_are_said(tmp_path: Path, said: Said) -> None:
    folder = clip(tmp_path / "clip")
    TextTower(TextTowerConfig(model=f"local-dir:{folder}"))
    assert said() == []
    Path(folder, "tokenizer.json").write_text("{}")
    TextTower(TextTowerConfig(model=folder))
    (line,) = said()
    assert "tokenizer CLIP's own assumed" in line
    assert "names no hf_tokenizer_name" in line


def test_a_text_tower_from_other_weights_than_the_encoders_is_said(
    tmp_path: Path, said: Said
) -> None:
    class Text(TextConfig):
        kind: str = "text"

    folders = [clip(tmp_path / name) for name in ("one", "other")]
    encoder = build(kind="dfn_clip", model=folders[0])
    for model in (folders[0], f"local-dir:{folders[0]}", folders[1]):
        load_text_tower(Text.model_validate({"text": {"model": model}}), encoder)
    (line,) = said()
    assert line.startswith(f"text {folders[1]}: from {folders[1]}/open_clip_model.safetensors, but")


def test_a_tokenizer_with_more_words_than_the_tower_is_refused(tmp_path: Path) -> None:
    text = {"context_length": 16, "vocab_size": 32000, "width": 16, "heads": 2, "layers": 2}
    folder = clip(tmp_path / "clip", text_cfg=text)
    with pytest.raises(TeacherError, match="49408 words.*32000.*hf_tokenizer_name"):
        TextTower(TextTowerConfig(model=folder, weights="none"))
