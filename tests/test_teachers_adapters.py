"""The open_clip and timm adapters: specs against the models, and weights from every source."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.normalization import OPENAI_MEAN, OPENAI_STD
from teachers.teacher import Teacher
from teachers.testing import check_teacher
from teachers.timm_source import timm  # imported after torchvision's operators are repaired

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TIMM_PART = {
    "architecture": "vit_base_patch16_siglip_224",
    "num_classes": 0,
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0},
}


def build(device: str | None = None, **value: object) -> Any:
    return build_teacher(parse_teacher(value), device=device)


def write(folder: Path, embed_dim: int, vision_cfg: dict[str, Any]) -> Path:
    folder.mkdir()
    config = {
        "model_cfg": {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision_cfg},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A tiny CLIP in hub layout, float16, without its text tower."""
    folder = write(tmp_path / "clip", 24, VISION)
    store(folder, build(kind="dfn_clip", model=str(folder), weights="none"))
    return folder


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    """A tiny SigLIP in hub layout, whose timm part lies in the same folder."""
    vision_cfg = {
        "image_size": 32,
        "timm_model_name": "local-dir:.",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    folder = write(tmp_path / "siglip", 64, vision_cfg)
    (folder / "config.json").write_text(json.dumps(TIMM_PART))
    store(folder, build(kind="siglip", model=str(folder), weights="none"))
    return folder


def store(folder: Path, teacher: Teacher) -> None:
    generator = torch.Generator().manual_seed(7)
    state = teacher.visual.state_dict()  # type: ignore[operator, union-attr]
    noise = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    tensors = {f"visual.{k}": v.half() for k, v in noise.items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize(
    "value, width, summary, side, millions, mean, std",
    [
        (
            {"kind": "dfn_clip", "model": "ViT-H-14-378-quickgelu", "weights": "dfn5b"},
            *(1280, 1024, 378, 632.7, OPENAI_MEAN, OPENAI_STD),
        ),
        (
            {"kind": "siglip", "model": "ViT-SO400M-14-SigLIP-384", "weights": "webli"},
            *(1152, 1152, 384, 428.2, (0.5,) * 3, (0.5,) * 3),
        ),
    ],
)
@pytest.mark.parametrize("weights", ["none", "published"])
def test_the_big_teachers_are_built_on_meta_and_are_what_their_spec_says(
    value: dict[str, str], width: int, summary: int, side: int, millions: float,
    mean: tuple[float, ...], std: tuple[float, ...], weights: str,
) -> None:  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    teacher = build("meta", **(value | ({"weights": "none"} if weights == "none" else {})))
    features = teacher(torch.empty(2, 3, side, side, device="meta"))
    assert features.summary is not None
    assert features.summary.shape == (2, summary) == (2, teacher.spec.summary_dim)
    assert features.spatial.shape == (2, width, 27, 27)
    assert teacher.spec.spatial_dim == width
    assert teacher.spec.resolution == (side, side)
    assert teacher.normalization == (mean, std)
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    # The weights alone would be 2.5 GB and 1.7 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    check_teacher(teacher)


@pytest.mark.long
def test_siglip_at_378_px_leaves_no_pixel_over_and_keeps_its_grid() -> None:
    value = {"kind": "siglip", "model": "ViT-SO400M-14-SigLIP-384", "weights": "none"}
    teacher = build("meta", **value, resolution=[378, 378])
    assert teacher(torch.empty(1, 3, 378, 378, device="meta")).spatial.shape[2:] == (27, 27)


def test_clip_features_are_normed_tokens_and_the_projected_class_token(clip: Path) -> None:
    teacher = build(kind="dfn_clip", model=str(clip))
    check_teacher(teacher)
    images = torch.rand(2, 3, 32, 32)
    visual = teacher.visual
    with torch.no_grad():
        pixels = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
            [0.4, 0.5, 0.6]
        ).view(3, 1, 1)
        tokens = visual.ln_post(visual.transformer(visual._embeds(pixels)))
        due = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    summary, spatial = teacher(images)
    torch.testing.assert_close(spatial, due)
    torch.testing.assert_close(summary, tokens[:, 0] @ visual.proj)
    unprojected = build(kind="dfn_clip", model=str(clip), summary="cls")
    assert unprojected.spec.summary_dim == 64
    torch.testing.assert_close(unprojected(images).summary, tokens[:, 0])


def test_siglip_features_are_normed_tokens_and_their_attention_pool(siglip: Path) -> None:
    teacher = build(kind="siglip", model=str(siglip))
    check_teacher(teacher)
    summary, spatial = teacher(images := torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        pixels = (images - teacher.mean) / teacher.std
        torch.testing.assert_close(summary, teacher.visual(pixels))
        tokens = spatial.flatten(2).transpose(1, 2)
        torch.testing.assert_close(summary, teacher.visual.trunk.attn_pool(tokens))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file_a_folder_or_the_models_own_folder_are_the_same(
    clip: Path, tmp_path: Path, suffix: str
) -> None:
    due = build(kind="dfn_clip", model=str(clip))
    (other := tmp_path / "other").mkdir()
    state = {f"visual.{k}": v for k, v in due.visual.state_dict().items()}
    file = other / f"weights{suffix}"
    if suffix == ".pt":
        text = {"logit_scale": torch.ones(())}
        torch.save({"state_dict": {f"module.{k}": v for k, v in (state | text).items()}}, file)
    else:
        save_file(state, file)
    for weights in (file, other):
        came = build(kind="dfn_clip", model=str(clip), weights=str(weights))
        for name, value in came.state_dict().items():
            assert torch.equal(value, due.state_dict()[name])


def test_random_weights_are_always_the_same_and_leave_the_callers_generator_alone(
    clip: Path,
) -> None:
    torch.manual_seed(1)
    due = torch.rand(1)
    torch.manual_seed(1)
    first = build(kind="dfn_clip", model=str(clip), weights="none")
    assert torch.equal(torch.rand(1), due)
    second = build(kind="dfn_clip", model=str(clip), weights="none")
    assert torch.equal(first.visual.proj, second.visual.proj)
    assert not torch.equal(first.visual.proj, build(kind="dfn_clip", model=str(clip)).visual.proj)


class Drawn(TorchFunctionMode):
    """Counts what is drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__ in ("kaiming_uniform_", "normal_", "uniform_", "erfinv_")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_unwritten_memory_is_nan")
@pytest.mark.parametrize("kind", ["dfn_clip", "siglip", "timm"])
def test_no_random_weights_are_drawn_where_all_are_loaded(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "timm":
        folder = tmp_path
        part = TIMM_PART | {"architecture": "vit_tiny_patch16_224"}
        (folder / "config.json").write_text(json.dumps(part))
        network = build(kind="timm", model=str(folder), weights="none").network
        save_file(network.state_dict(), folder / "model.safetensors")
    else:
        folder = request.getfixturevalue({"dfn_clip": "clip"}.get(kind, kind))
    with Drawn() as drawn:
        build(kind=kind, model=str(folder), weights="none")
    assert drawn.count > 0
    with Drawn() as drawn:
        teacher = build(kind=kind, model=str(folder))
    assert drawn.count == 0
    for name, value in [*teacher.named_parameters(), *teacher.named_buffers()]:
        assert value.isfinite().all(), name


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dfn_clip", "siglip"])
def test_interpolated_positions_serve_an_oblong_image(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue({"dfn_clip": "clip"}.get(kind, kind))
    teacher = build(kind=kind, model=str(folder), resolution=[16, 64])  # 2 x 8: as many as 4 x 4
    check_teacher(teacher)
    assert teacher(torch.rand(1, 3, 16, 64)).spatial.shape[2:] == (2, 8)
    native = build(kind=kind, model=str(folder))
    if kind == "dfn_clip":
        came, table = teacher.visual.positional_embedding[1:], native.visual.positional_embedding
        table = table[1:].T.reshape(1, 64, 4, 4)
        due = F.interpolate(table, (2, 8), mode="bicubic", antialias=True)[0].flatten(1).T
        torch.testing.assert_close(came, due)
    else:
        came, own = teacher.visual.trunk.pos_embed, native.visual.trunk.pos_embed
        assert not torch.equal(came, own)


def test_weights_that_do_not_fit_are_refused_by_name(clip: Path) -> None:
    path = clip / "open_clip_model.safetensors"
    state = {f"visual.{k}": v for k, v in build(kind="dfn_clip", model=str(clip)).visual.state_dict().items()}  # noqa: E501  # fmt: skip
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, path)
    with pytest.raises(TeacherError, match='does not fit the model.*Missing key.*"proj"'):
        build(kind="dfn_clip", model=str(clip))
    save_file({"text.weight": torch.ones(1)}, path)
    with pytest.raises(TeacherError, match=r"holds no tensors named visual\.\*"):
        build(kind="dfn_clip", model=str(clip))
    path.write_bytes(b"nothing")
    with pytest.raises(TeacherError, match="cannot be read"):
        build(kind="dfn_clip", model=str(clip))
    path.unlink()
    with pytest.raises(TeacherError, match="holds no weights file"):
        build(kind="dfn_clip", model=str(clip))


def test_a_pickle_of_other_objects_is_never_unpickled(clip: Path, tmp_path: Path) -> None:
    torch.save({"visual.proj": Path("x")}, path := tmp_path / "odd.pt")
    with pytest.raises(TeacherError, match="holds more than tensors"):
        build(kind="dfn_clip", model=str(clip), weights=str(path))


B32 = {"kind": "dfn_clip", "model": "ViT-B-32"}


@pytest.mark.parametrize(
    "value, message",
    [
        (
            {"kind": "dfn_clip", "model": "ViT-B-33"},
            "neither an open_clip model.*did you mean 'ViT-B-",
        ),
        (B32, "weights: None is neither a tag.*choose one of .*laion2b"),
        (B32 | {"weights": "laion2b_s34b_b79"}, "did you mean 'laion2b_s34b_b79k'"),
        (B32 | {"weights": "openai"}, "trained with QuickGELU, unlike model 'ViT-B-32'"),
        (B32 | {"weights": __file__}, "weights are read from .safetensors"),
        ({"kind": "dfn_clip", "model": "ViT-B-16-SigLIP", "weights": "none"}, "has a timm tower"),
        ({"kind": "dfn_clip", "model": "coca_ViT-B-32", "weights": "none"}, "no map of patch"),
        ({"kind": "siglip", "model": "ViT-B-32", "weights": "none"}, "no attention pool"),
        ({"kind": "dfn_clip", "model": "tests"}, "open_clip_config.json is missing"),
        ({"kind": "timm", "model": "vit_tinny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"kind": "timm", "model": "resnet18", "weights": "none", "summary": "cls"}, "no class to"),
        ({"kind": "timm", "model": "resnet18", "weights": "none", "features": 5}, "0 to 4"),
        ({"kind": "timm", "model": "resnet18", "weights": "nowhere.pt"}, "not a file or directory"),
        (
            {"kind": "timm", "model": "cait_s24_224", "resolution": [64, 64]},
            "takes only the size",
        ),
        ({"kind": "timm", "model": "hiera_tiny_224", "weights": "none"}, "norm of 'hiera_tiny.*-1"),
        (
            {"kind": "timm", "model": "vit_tiny_patch16_224", "resolution": [64, 65]},
            r"\(64, 65\) is not a multiple .* 16 px",
        ),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_words(
    value: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(TeacherError, match=message):
        build("meta" if value.get("weights") in (None, "none") else None, **value)


@pytest.mark.parametrize(
    "value, command",
    [
        (
            {"kind": "dfn_clip", "model": "ViT-B-32", "weights": "laion2b_s34b_b79k"},
            'hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K --include "open_clip_*"',
        ),
        (
            {"kind": "timm", "model": "vit_tiny_patch16_224.augreg_in21k"},
            "hf download timm/vit_tiny_patch16_224.augreg_in21k model.safetensors",
        ),
        (
            {"kind": "timm", "model": "vit_tiny_patch16_224"},
            "hf download timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k model.safetensors "
            "config.json",
        ),
    ],
)
def test_a_missing_download_says_what_was_sought_where_and_what_to_do(
    value: dict[str, str], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError) as caught:
        build(**value)
    told = (f"`{command} --local-dir DIR`", "give that path as weights")
    for part in (value["model"], str(tmp_path), "HF_HUB_OFFLINE", *told):
        assert part in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize(
    "model, options",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"features": -2, "summary": "pool"}),
        ("vit_tiny_patch16_224", {"resolution": [64, 96]}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("swin_tiny_patch4_window7_224", {}),
        ("samvit_base_patch16", {"features": -1, "summary": "none"}),
        ("resnet18", {}),
        ("resnet18", {"features": 2, "summary": "none"}),
        ("convnext_atto", {}),
        ("efficientnet_b0", {"features": 3}),
    ],
)
def test_a_timm_model_is_what_its_spec_says(model: str, options: dict[str, Any]) -> None:
    teacher = build("meta", kind="timm", model=model, weights="none", **options)
    check_teacher(teacher)  # shapes, through Teacher.forward
    side = teacher.spec.resolution
    teacher(torch.empty(1, 3, *side, device="meta"))
    cfg = timm.get_pretrained_cfg(model)
    assert teacher.normalization == (tuple(cfg.mean), tuple(cfg.std))


@pytest.mark.long
def test_timm_features_are_the_normed_tokens_and_the_class_token() -> None:
    teacher = build(kind="timm", model="vit_tiny_patch16_224", weights="none")
    check_teacher(teacher)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        tokens = teacher.network.forward_features((images - teacher.mean) / teacher.std)
    summary, spatial = teacher(images)
    torch.testing.assert_close(summary, tokens[:, 0])
    torch.testing.assert_close(spatial.flatten(2).transpose(1, 2), tokens[:, 1:])


@pytest.mark.long
def test_a_timm_cnn_takes_any_multiple_of_its_stride() -> None:
    teacher = build(kind="timm", model="resnet18", weights="none", features=3)
    check_teacher(teacher)
    assert teacher(torch.rand(1, 3, 48, 80)).spatial.shape == (1, 256, 3, 5)


@pytest.mark.parametrize("classes", [0, 10, 1000])
def test_timm_weights_from_a_file_load_strictly_with_or_without_a_classifier(
    tmp_path: Path, classes: int
) -> None:
    torch.manual_seed(5)
    source = timm.create_model("resnet10t", num_classes=classes)
    save_file(source.state_dict(), file := tmp_path / "weights.safetensors")
    value = {"kind": "timm", "model": "resnet10t", "weights": str(file)}
    images = torch.rand(1, 3, 64, 64)
    teacher = build(**value)
    with torch.no_grad():
        due = source.eval().forward_features((images - teacher.mean) / teacher.std)
    torch.testing.assert_close(teacher(images).spatial, due)
    state = {k: v for k, v in source.state_dict().items() if k != "layer1.0.conv1.weight"}
    save_file(state, file)
    with pytest.raises(TeacherError, match="Missing key.*layer1.0.conv1.weight"):
        build(**value)


def test_a_timm_model_from_a_local_directory_brings_its_own_config(tmp_path: Path) -> None:
    part = TIMM_PART | {"architecture": "vit_tiny_patch16_224"}
    (tmp_path / "config.json").write_text(json.dumps(part))
    teacher = build(kind="timm", model=str(tmp_path), weights="none")
    save_file(teacher.network.state_dict(), tmp_path / "model.safetensors")
    loaded = build(kind="timm", model=str(tmp_path))
    assert loaded.spec.resolution == (32, 32)
    assert loaded.normalization == ((0.5,) * 3, (0.5,) * 3)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded(images).spatial, teacher(images).spatial)


@pytest.mark.parametrize("kind", ["dfn_clip", "siglip"])
def test_layers_of_a_tower_are_its_normed_patch_tokens(
    kind: str, request: pytest.FixtureRequest
) -> None:
    teacher = build(
        kind=kind, model=str(request.getfixturevalue({"dfn_clip": "clip"}.get(kind, kind)))
    )
    images = torch.rand(2, 3, 32, 32)
    assert teacher.num_layers == 2
    first, last = teacher.layers(images, [0, 1])
    torch.testing.assert_close(last, teacher(images).spatial)
    # A tower whose second block does nothing has the first one's map as its last.
    blocks: Any = (
        teacher.visual.transformer.resblocks if kind == "dfn_clip" else teacher.visual.trunk.blocks
    )
    blocks[1].forward = lambda tokens, **_: tokens
    torch.testing.assert_close(first, teacher(images).spatial)
    assert (first - last).abs().max() > 0.1


def test_layers_of_a_timm_vit_and_cnn_are_those_of_its_blocks_and_stages() -> None:
    images = torch.rand(2, 3, 64, 64)
    vit = build(kind="timm", model="test_vit2", weights="none", resolution=[64, 64])
    assert vit.num_layers == len(vit.network.blocks)
    torch.testing.assert_close(vit.layers(images, [0, vit.num_layers - 1])[1], vit(images).spatial)
    cnn = build(kind="timm", model="resnet18", weights="none")
    maps = cnn.layers(images, [1, 3])
    assert [tuple(each.shape[1:]) for each in maps] == [(64, 16, 16), (256, 4, 4)]
    of_stage = build(kind="timm", model="resnet18", weights="none", features=3)
    torch.testing.assert_close(maps[1], of_stage(images).spatial)


@pytest.mark.long
@pytest.mark.parametrize(
    "model, size, grid, free",
    [
        ("resnet10t", 176, (6, 6), True),  # ceil(176 / 32)
        ("xception41", 299, (10, 10), True),
        ("inception_v3", 299, (8, 8), False),  # convolutions without padding
        ("levit_128", 224, (4, 4), False),
    ],
)
def test_a_cnn_whose_size_is_no_multiple_of_its_stride_has_its_own_grid(
    model: str, size: int, grid: tuple[int, int], free: bool
) -> None:
    teacher = build("meta", kind="timm", model=model, weights="none")
    assert teacher.spec.grid(size, size) == grid
    assert teacher.spec.any_resolution == free
    check_teacher(teacher)


def test_sam_interpolates_its_positions_where_the_recipe_says_so(tmp_path: Path) -> None:
    args = TIMM_PART["model_args"] | {"global_attn_indexes": [1], "window_size": 3, "neck_chans": 8}
    part = TIMM_PART | {"architecture": "samvit_base_patch16", "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(part))
    entry = {"kind": "timm", "model": str(tmp_path), "weights": "none", "features": -1}
    native = build(**entry, summary="none")
    asked = build(**entry, summary="none", resolution=[32, 32])
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(asked(images).spatial, native(images).spatial)
    assert asked(torch.rand(1, 3, 48, 64)).spatial.shape == (1, 64, 6, 8)
    assert native.spec.spatial_from == "last block, before the neck"
    assert build(**(entry | {"features": "norm"})).spec.spatial_from == "last block, after the neck"
