"""Initial weights, from timm and from our own students: exact, or refused by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.config import HeadConfig, StudentConfig
from student.errors import StudentError
from student.initial import build
from student.model import Student
from student.storage import save_student
from teachers.features import FeatureSpec

CLIP = FeatureSpec(summary_dim=5, spatial_dim=6, patch_size=16, resolution=(32, 32))
HEAD = HeadConfig(hidden_dim=12, num_layers=0)
TINY = {"size": "tiny", "max_resolution": 224, "num_registers": 0, "head": HEAD}


def timm_vit(name: str, **options: Any) -> nn.Module:
    """A random timm ViT in which no weight is zero, so that none can be lost unseen."""
    import timm  # after student, which repairs torchvision's operators

    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def from_timm(path: Path, name: str, targets: int = 1, **changes: Any) -> Student:
    init = {"kind": "timm", "model": name, "weights": path}
    config = StudentConfig(**(TINY | {"init": init} | changes))
    return build(config, {f"t{i}": CLIP for i in range(targets)}).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = timm_vit("vit_tiny_patch16_224")
    path = tmp_path_factory.mktemp("timm") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return model, path


def test_the_trunk_gives_the_tokens_of_its_timm_vit(tiny: tuple[nn.Module, Path]) -> None:
    model, path = tiny
    student = from_timm(path, "vit_tiny_patch16_224", final_norm=True)
    images = torch.randn(1, 3, 224, 224)
    tokens = model.forward_features(images)
    assert tokens.std() > 0.5
    torch.testing.assert_close(student.trunk(images), tokens, atol=1e-5, rtol=1e-5)


def test_without_a_final_norm_that_of_the_timm_vit_is_left_out_and_that_is_said(
    tiny: tuple[nn.Module, Path], said: Callable[[], list[str]]
) -> None:
    model, path = tiny
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    student = from_timm(path, "vit_tiny_patch16_224", **colours)
    images = torch.randn(1, 3, 224, 224)
    due = model.forward_features(images)
    torch.testing.assert_close(model.norm(student.trunk(images)), due, atol=1e-5, rtol=1e-5)
    (line,) = said()
    assert line == (
        "student.init: timm's vit_tiny_patch16_224: its final norm is left out, as RADIO leaves it "
        "out; student.final_norm=true keeps it"
    )
    from_timm(path, "vit_tiny_patch16_224", final_norm=True, **colours)
    assert said() == []


def test_the_student_normalises_pixels_as_its_timm_vit_does(tiny: tuple[nn.Module, Path]) -> None:
    student = from_timm(tiny[1], "vit_tiny_patch16_224")
    assert student.config.mean == student.config.std == (0.5, 0.5, 0.5)
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert from_timm(tiny[1], "vit_tiny_patch16_224", **colours).config.mean == (0.1, 0.2, 0.3)


def pair(folder: Path, model: nn.Module, **config: Any) -> Path:
    """A file with weights and their average, and timm's config beside it if one is given."""
    plain = model.state_dict()
    average = {name: value + 0.25 for name, value in plain.items()}
    file = folder / "tiny.pth"
    torch.save({"state_dict": plain, "state_dict_ema": average}, file)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return file


def test_of_several_sets_in_a_file_timms_choice_starts_the_trunk(
    tiny: tuple[nn.Module, Path], tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    file = pair(tmp_path, tiny[0])
    student = from_timm(file, "vit_tiny_patch16_224.augreg_in21k", final_norm=True)
    assert torch.equal(student.trunk.norm.bias, tiny[0].state_dict()["norm.bias"] + 0.25)
    (line,) = said()
    assert line.startswith(f"weights {file}: took state_dict_ema of [state_dict, state_dict_ema]")


def test_the_pixels_of_a_bare_file_are_assumed_and_said(
    tiny: tuple[nn.Module, Path], said: Callable[[], list[str]]
) -> None:
    from_timm(tiny[1], "vit_tiny_patch16_224", final_norm=True)
    (line,) = said()
    assert "mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5] assumed" in line
    assert "vit_tiny_patch16_224.augreg_in21k_ft_in1k: " in line
    assert "set student.mean" in line
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.5, 0.5)}
    from_timm(tiny[1], "vit_tiny_patch16_224", final_norm=True, **colours)
    assert said() == ["student.std: [0.4, 0.5, 0.5] is taken; student.init has [0.5, 0.5, 0.5]"]


def test_a_config_beside_the_file_states_its_pixels(
    tiny: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    file = pair(tmp_path, tiny[0], **config)
    student = from_timm(file, "vit_tiny_patch16_224")
    assert (student.config.mean, student.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pair(tmp_path, tiny[0], **config | {"architecture": "vit_small_patch16_224"})
    with pytest.raises(StudentError, match="architecture 'vit_small_patch16_224'; give student"):
        from_timm(file, "vit_tiny_patch16_224")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_damaged_file_is_one_message(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"tiny.{suffix}"
    file.write_bytes(b"no weights at all")
    with pytest.raises(StudentError, match="student.init: timm's vit_tiny.*cannot be read|unpickl"):
        from_timm(file, "vit_tiny_patch16_224")


def test_registers_layer_scale_and_class_tokens_without_positions_are_carried_over(
    tmp_path: Path,
) -> None:
    from safetensors.torch import save_file

    name = "vit_small_patch14_reg4_dinov2"
    model = timm_vit(name, img_size=518)
    save_file(model.state_dict(), tmp_path / "s.safetensors")
    changes = {"size": "small", "patch_size": 14, "max_resolution": 518, "num_registers": 4}
    student = from_timm(tmp_path / "s.safetensors", name, layer_scale=1e-5, **changes)
    own = student.trunk.embedding
    torch.testing.assert_close(own.class_tokens, model.cls_token[0])
    torch.testing.assert_close(own.registers, model.reg_token[0])
    assert torch.equal(student.trunk.blocks[3].ls1.gamma, model.blocks[3].ls1.gamma)
    tokens = own(torch.randn(1, 3, 42, 70))
    for ours, theirs in zip(student.trunk.blocks, model.blocks, strict=True):
        assert torch.equal(ours(tokens), theirs(tokens))
    assert student.config.mean == (0.485, 0.456, 0.406)


def test_every_class_token_starts_as_timms(tiny: tuple[nn.Module, Path]) -> None:
    model, path = tiny
    tokens = from_timm(path, "vit_tiny_patch16_224", targets=3).trunk.embedding.class_tokens
    torch.testing.assert_close(tokens, (model.cls_token + model.pos_embed[:, :1])[0].expand(3, -1))


def test_another_patch_size_and_table_resample_kernel_and_positions(
    tiny: tuple[nn.Module, Path],
) -> None:
    model, path = tiny
    student = from_timm(
        path, "vit_tiny_patch16_224", patch_size=32, max_resolution=640, num_registers=2
    )
    embedding = student.trunk.embedding
    # FlexiViT: an enlarged patch embeds under the enlarged kernel as it did before.
    patch = torch.randn(1, 3, 16, 16)
    larger = F.interpolate(patch, (32, 32), mode="bicubic", antialias=True)
    expected = F.conv2d(patch, model.patch_embed.proj.weight).flatten()
    torch.testing.assert_close(
        embedding.projection(larger.flatten()), expected, atol=1e-4, rtol=1e-4
    )
    assert embedding.positions.shape == (20, 20, 192)
    grid = (model.pos_embed[0, 1:] + model.patch_embed.proj.bias).T.view(1, 192, 14, 14)
    resized = F.interpolate(grid, (20, 20), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(embedding.positions, resized.permute(1, 2, 0), atol=1e-5, rtol=1e-4)
    assert student.trunk(torch.randn(1, 3, 64, 160)).shape == (1, 1 + 2 + 10, 192)


def test_what_timm_lacks_starts_fresh_and_is_logged(
    tiny: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "student"):
        from_timm(tiny[1], "vit_tiny_patch16_224", num_registers=2)
    assert "vit_tiny_patch16_224 has no registers: they start random" in caplog.text


def test_a_tanh_gelu_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    name = "vit_base_patch32_siglip_256"
    small = timm_vit(name, num_classes=0, **shape)
    monkeypatch.setattr("student.initial.timm.create_model", lambda *_, **__: small)
    torch.save(small.state_dict(), tmp_path / "s.pt")
    with caplog.at_level(logging.INFO, "student"):
        from_timm(tmp_path / "s.pt", name, width=16, depth=1, heads=2, mlp_ratio=4, patch_size=32)
    assert "approximates GELU by tanh" in caplog.text
    assert "has no class tokens: they start random" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_small_patch16_224", {}, "vit_small_patch16_224 has width 384, .* student has 192"),
        ("vit_tiny_patch16_224", {"depth": 11}, "has depth 12, .* has 11"),
        ("vit_tiny_patch16_224", {"heads": 4}, "has heads 3, .* has 4"),
        ("vit_tiny_patch16_224", {"mlp_ratio": 3}, "has mlp_dim 768, .* has 576"),
        ("vit_tiny_patch16_224", {"layer_scale": 0.1}, r"has no blocks.0.ls1.gamma and 23 more"),
        ("resnet18", {}, "resnet18 is a ResNet; only timm's VisionTransformer"),
        ("vit_base_patch16_rope_224", {}, "is a Eva; only"),
        ("vit_small_patch16_clip_224", {}, "no such model \\(did you mean"),
        ("vit_base_patch16_clip_quickgelu_224", {"size": "base"}, "activation QuickGELU"),
        ("vit_base_patch16_clip_224", {"size": "base"}, "has norm_pre.weight and 1 more weights"),
        ("vit_small_plus_patch16_dinov3", {}, "is a Eva"),
        ("vit_giant_patch14_dinov2", {"size": "giant"}, "has blocks of type Block with GluMlp"),
    ],
)
def test_a_timm_model_that_does_not_fit_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict, message: str
) -> None:
    import timm

    def create(name: str, **_: Any) -> nn.Module:
        """The hub's model without its weights: shapes alone decide here."""
        return real(name)

    real = timm.create_model
    monkeypatch.setattr("student.initial.timm.create_model", create)
    init = {"kind": "timm", "model": name}
    with torch.device("meta"), pytest.raises(StudentError, match=message):
        build(StudentConfig(**(TINY | changes | {"init": init})), {"t": CLIP})


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="student.init.weights: no such file: .*gone.pt"):
        from_timm(tmp_path / "gone.pt", "vit_tiny_patch16_224")


def test_a_weights_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(StudentError, match="x.pt is for another model"):
        from_timm(tmp_path / "x.pt", "vit_tiny_patch16_224")


def test_weights_that_cannot_be_downloaded_point_to_a_local_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("name not known")

    monkeypatch.setattr("student.initial.timm.create_model", unreachable)
    init = {"kind": "timm", "model": "vit_tiny_patch16_224"}
    with pytest.raises(StudentError, match=r"not be downloaded \(name not known\); set .*weights"):
        build(StudentConfig(**TINY, init=init), {"t": CLIP})


SMALL = {"width": 16, "heads": 2, "depth": 1, "patch_size": 4, "max_resolution": 24, "head": HEAD}


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Student, Path]:
    torch.manual_seed(0)
    targets = {"a": CLIP, "b": CLIP, "c": CLIP}
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    student = Student(StudentConfig(**SMALL, **colours), targets)
    path = tmp_path / "student.safetensors"
    save_student(path, student.config, targets, student.state_dict(), {})
    return student, path


def weights(student: Student, prefix: str) -> dict[str, Tensor]:
    return {k: v for k, v in student.state_dict().items() if k.startswith(prefix)}


def test_a_student_starts_from_another_ones_trunk_and_heads_by_teacher(
    exported: tuple[Student, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, path = exported
    wider = FeatureSpec(summary_dim=5, spatial_dim=8, patch_size=16, resolution=(32, 32))
    targets = {"new": CLIP, "c": CLIP, "b": wider}
    config = StudentConfig(**SMALL, init={"kind": "student", "path": path})
    torch.manual_seed(1)
    fresh = Student(StudentConfig(**SMALL), targets)
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO, "student"):
        student = build(config, targets)
    tokens = "trunk.embedding.class_tokens"
    ours, theirs, random = (s.state_dict()[tokens] for s in (student, source, fresh))
    assert torch.equal(ours, torch.stack([random[0], theirs[2], theirs[1]]))
    for name, value in weights(source, "trunk.").items():
        assert name == tokens or torch.equal(student.state_dict()[name], value)
    for teacher, origin in (("c", source), ("b", fresh), ("new", fresh)):
        for name, value in weights(origin, f"heads.{teacher}.").items():
            assert torch.equal(student.state_dict()[name], value)
    assert student.config.mean == (0.1, 0.2, 0.3)
    assert "loaded the head of c" in caplog.text
    assert "the head of b starts from random weights: its dimensions differ" in caplog.text
    assert "the head of new starts from random weights: the file has none" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, r"has width 16, but the student has 32; set student.width=16$"),
        (
            {"depth": 2, "mlp_ratio": 3.0},
            r"has depth 1 and mlp_ratio 4.0, but .* 2 and 3.0; set student.depth=1 "
            r"student.mlp_ratio=4.0$",
        ),
        ({"patch_size": 8}, "has patch_size 4, but the student has 8; set student.patch_size=4$"),
        ({"max_resolution": 48}, "has max_resolution 24, but the student has 48; set student.max"),
        (
            {"final_norm": True},
            "has final_norm False, but the student has True; set student.final_norm=false$",
        ),
        ({"num_registers": 2}, "has num_registers 4, but .* 2; set student.num_registers=4$"),
        ({"num_registers": 0}, "has num_registers 4, but .* 0; set student.num_registers=4$"),
        ({"layer_scale": 0.1}, "has layer_scale None, but .* 0.1; set student.layer_scale=null$"),
    ],
)
def test_a_student_with_another_trunk_is_refused(
    exported: tuple[Student, Path], changes: dict, message: str
) -> None:
    init = {"kind": "student", "path": exported[1]}
    with pytest.raises(StudentError, match=message):
        build(StudentConfig(**(SMALL | changes), init=init), {"a": CLIP})


@pytest.mark.parametrize("space", ["teacher", "training"])
def test_heads_that_left_the_training_space_are_named(
    space: str, exported: tuple[Student, Path]
) -> None:
    source, path = exported
    metadata = {"head_space": space}
    save_student(path, source.config, source.targets, source.state_dict(), metadata)
    config = StudentConfig(**SMALL, init={"kind": "student", "path": path})
    student = build(config, {"a": CLIP, "new": CLIP})
    assert student.in_teacher_space == ({"a"} if space == "teacher" else set())
    for name, value in weights(source, "heads.a.").items():
        assert torch.equal(student.state_dict()[name], value)


def test_such_a_student_gives_its_trunk_where_its_heads_are_left(
    exported: tuple[Student, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, path = exported
    folded = {"head_space": "teacher"}
    save_student(path, source.config, source.targets, source.state_dict(), folded)
    init = {"kind": "student", "path": path, "heads": False}
    with caplog.at_level(logging.INFO, "student"):
        student = build(StudentConfig(**SMALL, init=init), {"a": CLIP})
    assert not student.in_teacher_space
    for name, value in weights(source, "trunk.blocks.").items():
        assert torch.equal(student.state_dict()[name], value)
    for name, value in weights(student, "heads.a.").items():
        assert not (name.endswith("fc1.weight") and torch.equal(value, source.state_dict()[name]))
    assert "the head of a starts from random weights: student.init.heads is false" in caplog.text


def test_attention_heads_of_another_number_start_fresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head: dict[str, Any] = {"attention_blocks": 1, "attention_heads": 2}
    source = Student(StudentConfig(**(SMALL | {"head": head})), {"a": CLIP})
    path = tmp_path / "student.safetensors"
    save_student(path, source.config, source.targets, source.state_dict(), {})
    for key, value in (("attention_heads", 2), ("attention_heads", 4), ("attention_bias", True)):
        changed = {"head": head | {key: value}, "init": {"kind": "student", "path": path}}
        with caplog.at_level(logging.INFO, "student"):
            student = build(StudentConfig(**(SMALL | changed)), {"a": CLIP})
        name = "heads.a.spatial.fc1.weight"
        taken = torch.equal(student.state_dict()[name], source.state_dict()[name])
        assert taken == (value == 2)
        due = f"the head of a starts from random weights: head.{key} differs"
        assert (due in caplog.text) != taken
