"""The RADIO format, read here as the public loader reads it.

That loader is restated here, in float64, from the document alone; nothing of ours reads the file.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.formats.export import export_student
from distill.formats.radio import save_radio
from distill.formats.radio_heads import refuse_heads
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import load_student_recipe
from student.config import SHAPES, HeadConfig, StudentConfig
from student.model import Student
from student.storage import StudentFile
from tests.tiny_export import TARGETS, build, export, outputs, write_run

ATTENTIVE = HeadConfig(hidden_dim=12, num_layers=1, attention_blocks=2)  # as C-RADIOv4's

# Of timm's model, and replaced by the position generator.
REPLACED = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def file_of(student: Student) -> StudentFile:
    """Its file, with every weight moved so that none can be lost unseen."""
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return StudentFile(student.config, student.targets, dict(student.state_dict()), {})


def timm_model(args: argparse.Namespace) -> Any:
    import timm  # after student, which repairs torchvision's operators

    model = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=args.in_chans or 3,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        scriptable=args.torchscript,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    if not args.model_norm:
        model.norm = torch.nn.Identity()
    return model.eval()


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v.double() for k, v in state.items() if k.startswith(prefix)}


def mlp_v2(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    def affine(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def activated(x: Tensor, name: str) -> Tensor:
        parameters = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.gelu(F.layer_norm(x, x.shape[-1:], *parameters))

    x = affine(x, "fc1")
    for i in range(sum(k.startswith("blocks.") and k.endswith(".2.weight") for k in state)):
        x = x + affine(activated(x, f"blocks.{i}.0"), f"blocks.{i}.2")
    return affine(activated(x, "final.0"), "final.2")


def attn(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Two blocks with 16 heads, then a v2: of the format, not of the file."""
    from timm.models.vision_transformer import Block

    for i in range(2):
        block = Block(x.shape[-1], num_heads=16, init_values=1e-5).double().eval()
        block.load_state_dict(part(state, f"blocks.{i}."))
        x = block(x)
    return mlp_v2(x, part(state, "mlp."))


def unfold(features: Tensor, grid: tuple[int, int], u: int) -> Tensor:
    """(B, h w, u u D) with channels (row in cell, column in cell, channel) to (B, D, u h, u w)."""
    (h, w), b = grid, len(features)
    cells = features.view(b, h, w, u, u, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * u, w * u)


@torch.no_grad()
def public(path: Path, images: Tensor, adaptors: list[str]) -> dict[str, Tensor]:
    loaded = torch.load(path, weights_only=False)
    args, state = loaded["args"], loaded["state_dict"]
    assert (args.spectral_reparam, args.spectral_heads, args.damp) == (False, False, None)
    model = timm_model(args).double()
    base = part(state, "base_model.")
    generator = part(base, "patch_generator.")
    rest = {k: v for k, v in base.items() if not k.startswith("patch_generator.")}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    assert set(missing) == REPLACED
    assert not unexpected
    p = model.patch_embed.patch_size[0]
    side = args.cpe_max_size // p
    assert model.patch_embed.img_size != (args.cpe_max_size,) * 2  # positions are cropped
    conditioner = part(state, "input_conditioner.")
    x = (images.double() - conditioner["norm_mean"]) / conditioner["norm_std"]
    patches = F.unfold(x, p, stride=p).transpose(1, 2) @ generator["embedder.weight"].T
    h, w = images.shape[2] // p, images.shape[3] // p
    table = generator["pos_embed"].view(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(table, (max(h, w),) * 2, mode="bilinear")[:, :, :h, :w]
    prefix = generator["cls_token.token"].expand(len(x), -1, -1)
    tokens = torch.cat([prefix, patches + square.flatten(2).transpose(1, 2)], dim=1)
    tokens = model.norm(model.blocks(tokens))
    names = list(dict.fromkeys(teacher["name"] for teacher in args.teachers))
    assert args.cls_token_per_teacher
    skip = len(names) + args.cpe_num_registers
    assert prefix.shape[1] == skip
    summaries = [names.index(t["name"]) for t in args.teachers if t.get("use_summary", True)]
    patches = tokens[:, skip:]
    result = {
        "backbone/summary": tokens[:, summaries].flatten(1),
        "backbone/spatial": unfold(patches, (h, w), 1),
    }
    assert args.mlp_version == "v2"
    spatial = {None: mlp_v2, "attn": attn}[args.spatial_mlp_version]
    for name in adaptors:
        entry = args.teachers[names.index(name)]
        head = mlp_v2(tokens[:, names.index(name)], part(state, f"_heads.{name}."))
        feature = spatial(patches, part(state, f"_feature_projections.{name}."))
        result[f"{name}/summary"] = head
        upsample = entry.get("fd_upsample_factor", 1)
        result[f"{name}/spatial"] = unfold(feature, (h, w), upsample)
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 0, "layer_scale": 0.1, "final_norm": True},
        {"layer_scale": 0.1, "head": ATTENTIVE},
        {"register_multiple": 8, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        {"patch_size": 56, "max_resolution": 224},  # the nominal side of timm's models
        {"mlp_ratio": 4304 / 1152, "max_resolution": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(2, 5), (6, 6), (3, 3), (7, 2)])
def test_the_public_loader_returns_what_the_student_does(
    tmp_path: Path, changes: dict[str, Any], grid: tuple[int, int]
) -> None:
    student = build(**changes)
    save_radio(tmp_path / "s.pth.tar", file_of(student))
    p = student.config.patch_size
    images = torch.rand(2, 3, grid[0] * p, grid[1] * p)
    expected = outputs(student, images)
    actual = public(tmp_path / "s.pth.tar", images, list(TARGETS))
    zero = actual.pop("muted/summary")  # its teacher has none, but the loader wants a head
    assert torch.equal(zero, torch.zeros(2, 1).double())
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(value.double(), actual[name], atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("size", SHAPES)
def test_args_make_timm_build_the_shape_of_every_size(tmp_path: Path, size: str) -> None:
    head = HeadConfig(hidden_dim=2, num_layers=0)
    student = Student(StudentConfig(size="tiny", depth=1, head=head), TARGETS)
    # The trunk's weights do not count here: the file describes another size.
    config = student.config.model_copy(update={"size": size, "depth": None})
    save_radio(tmp_path / "s", file_of(student)._replace(config=config))
    args = torch.load(tmp_path / "s", weights_only=False)["args"]
    with torch.device("meta"):
        model = timm_model(args)
    block = model.blocks[0]
    actual = model.embed_dim, len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features
    assert actual == SHAPES[size]
    assert model.patch_embed.patch_size == (16, 16)
    named = size in ("tiny", "small", "base", "large", "huge")
    assert ("embed_dim" in args.model_kwargs) != named
    assert size in args.model or not named


def test_the_vit_of_every_recipe_has_a_place_in_the_format() -> None:
    paths = (Path(__file__).parent.parent / "recipes").glob("*.yaml")
    students = [path for path in paths if "upsampler" not in path.stem]
    configs = {path.stem: load_student_recipe(path, []).student for path in students}
    vits = {name: c for name, c in configs.items() if isinstance(c, StudentConfig)}
    assert any(config.head.attention_blocks for config in vits.values())
    for name, config in vits.items():
        refuse_heads(StudentFile(config, TARGETS, {}, {}))
        assert not config.isolated
        assert config.final_norm == (name == "cpu_ablation")  # whose figures have one


def test_heads_leave_in_their_teachers_own_spaces(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build())
    folded = export(checkpoint, tmp_path / "s", heads=("clip",), teacher_space=True)
    export_student(checkpoint, tmp_path / "s.pth", format="radio", heads=("clip",))
    images = torch.rand(1, 3, 8, 20)
    actual, expected = public(tmp_path / "s.pth", images, ["clip"]), outputs(folded, images)
    torch.testing.assert_close(actual["clip/spatial"].float(), expected["clip/spatial"])
    state = torch.load(tmp_path / "s.pth", weights_only=False)["state_dict"]
    assert not [key for key in state if "siglip" in key or "muted" in key]


def test_heads_that_were_trained_on_raw_features_leave_as_they_are(tmp_path: Path) -> None:
    student = build()
    checkpoint = write_run(tmp_path, student, phi_s="none")
    export_student(checkpoint, tmp_path / "s.pth", format="radio")
    images = torch.rand(1, 3, 8, 20)
    actual, expected = public(tmp_path / "s.pth", images, ["clip"]), outputs(student, images)
    torch.testing.assert_close(actual["clip/spatial"].float(), expected["clip/spatial"])


def test_a_student_whose_statistics_are_out_of_reach_is_refused(tmp_path: Path) -> None:
    export(write_run(tmp_path, build()), tmp_path / "s", heads=("clip",))
    with pytest.raises(RecipeError, match="statistics of 'clip' are in the checkpoints of its run"):
        export_student(tmp_path / "s", tmp_path / "s.pth", format="radio")
    export_student(tmp_path / "s", tmp_path / "s.pth", format="radio", heads=())


@pytest.mark.parametrize("size", [(24, 24), (8, 20), (28, 12)])
def test_timms_loader_of_the_family_returns_the_map_of_a_default_student(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """timm takes the hub's names, which have another prefix, and its own name of the shape."""
    import timm
    from safetensors.torch import save_file

    student = build()
    save_radio(tmp_path / "s.pth", file_of(student))
    state = torch.load(tmp_path / "s.pth", weights_only=False)["state_dict"]
    on_hub = {f"radio_model.{k.replace('base_model.', 'model.')}": v for k, v in state.items()}
    save_file(on_hub, tmp_path / "model.safetensors")
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
    model = timm.create_model(
        "naflexvit_so400m_patch16_radio_v4",
        **shape,
        **{"mlp_ratio": 4.0, "reg_tokens": 6, "pos_embed_grid_size": (6, 6), "num_classes": 0},
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")},
    ).eval()
    images = torch.rand(2, 3, *size)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (student.mean, student.std))
    with torch.no_grad():
        tokens = model.forward_features((images - mean) / std)
    expected = outputs(student, images)
    spatial = unfold(tokens[:, 7:], (size[0] // 4, size[1] // 4), 1)
    torch.testing.assert_close(spatial, expected["backbone/spatial"], atol=1e-5, rtol=1e-5)
    summary = tokens[:, :2].flatten(1)
    torch.testing.assert_close(summary, expected["backbone/summary"], atol=1e-5, rtol=1e-5)


def test_timms_plain_vit_takes_a_default_student_at_its_own_size(tmp_path: Path) -> None:
    """The converter resizes and crops the position table once, for an oblong image here."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    student = build()
    save_radio(tmp_path / "s.pth", file_of(student))
    state = torch.load(tmp_path / "s.pth", weights_only=False)["state_dict"]
    on_hub = {f"radio_model.{k.replace('base_model.', 'model.')}": v for k, v in state.items()}
    model = VisionTransformer(
        **{"img_size": (8, 20), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        **{"reg_tokens": 6, "no_embed_class": True, "final_norm": False, "num_classes": 0},
    ).eval()
    converted = checkpoint_filter_fn(
        on_hub, model, interpolation="bilinear", antialias=False, align_corners=False
    )
    model.load_state_dict(converted)
    images = torch.rand(2, 3, 8, 20)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (student.mean, student.std))
    with torch.no_grad():
        tokens = model.forward_features((images - mean) / std)
    due = outputs(student, images)["backbone/spatial"]
    torch.testing.assert_close(unfold(tokens[:, 7:], (2, 5), 1), due, atol=1e-5, rtol=1e-5)


def test_a_file_holds_nothing_but_a_namespace_and_plain_values(tmp_path: Path) -> None:
    save_radio(tmp_path / "s.pth", file_of(build()))
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(tmp_path / "s.pth", weights_only=True)
    assert loaded.keys() == {"args", "state_dict"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"isolated": ("clip",)},
            "student.isolated .* of clip, which the format .*use safetensors",
        ),
        (
            {"head": HeadConfig(hidden_dim=8, attention_blocks=1, attention_heads=2)},
            "student.head: 1 attention_blocks with 2 attention_heads; .* are 2 with 16; use "
            "safetensors, or drop the heads with --no-heads",
        ),
        (
            {"head": ATTENTIVE.model_copy(update={"attention_bias": True})},
            "student.head.attention_bias: .* as those of older students have",
        ),
        (
            {"head": ATTENTIVE.model_copy(update={"upsample": {"clip": 2}})},
            "student.head.upsample: the map of clip is denser than the grid",
        ),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        save_radio(tmp_path / "s", file_of(build(**changes)))
    assert not list(tmp_path.iterdir())


def test_a_bias_of_zero_does_not_matter_and_a_head_in_the_way_may_be_left_out(
    tmp_path: Path,
) -> None:
    head = ATTENTIVE.model_copy(update={"attention_bias": True, "upsample": {"clip": 2}})
    student = build(head=head)
    for name, value in student.named_parameters():
        if name.endswith("ls1.gamma"):
            value.data.fill_(0.5)
        assert "attn.qkv.bias" not in name or not value.any()
    checkpoint = write_run(tmp_path, student, phi_s="none")
    heads = ("siglip", "muted")
    export_student(checkpoint, tmp_path / "s.pth", format="radio", heads=heads)
    images = torch.rand(1, 3, 8, 20)
    actual, expected = public(tmp_path / "s.pth", images, [*heads]), outputs(student, images)
    for name in ("siglip/spatial", "siglip/summary", "muted/spatial"):
        torch.testing.assert_close(actual[name].float(), expected[name], atol=1e-4, rtol=1e-4)
