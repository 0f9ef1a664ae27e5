"""RADIO checkpoints: tiny ones in the public format, against a slow float64 restatement.

The names and shapes are those of the public loader, written out once more.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.fingerprint import teacher_fingerprint
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from teachers.radio_format import read_radio
from teachers.radio_models import PUBLISHED, build_trunk, timm
from teachers.testing import check_teacher

C, DEPTH, HEADS, P, SIDE, HIDDEN = 16, 2, 2, 4, 5, 24
TEACHERS = [
    {"name": "clip", "type": "open_clip"},
    {"name": "sam", "type": "sam", "use_summary": False},
    {"name": "dino", "type": "dino_v2"},
]
ARGS: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"embed_dim": C, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": HIDDEN / C},
    "cpe_max_size": SIDE * P,
    "cls_token_per_teacher": True,
    "register_multiple": 5,
    "teachers": TEACHERS,
    "dtype": torch.float32,
}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.3


def norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + noise(C), f"{name}.bias": noise(C)}


def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.weight": noise(out, into), f"{name}.bias": noise(out)}


def trunk(*, gated: bool = False, extras: bool = False, tokens: int = 5) -> dict[str, Tensor]:
    """Two blocks; `gated` has DINOv2's MLP, `extras` LayerScale, a patch bias and a final norm."""
    torch.manual_seed(0)
    state = {
        "patch_generator.embedder.weight": noise(C, 3 * P * P),
        "patch_generator.pos_embed": noise(1, SIDE * SIDE, C),
        "patch_generator.cls_token.token": noise(tokens, C),
    }
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state |= linear(f"{block}.attn.qkv", 3 * C, C) | linear(f"{block}.attn.proj", C, C)
        if gated:
            state |= linear(f"{block}.mlp.w12", 2 * HIDDEN, C)
            state |= linear(f"{block}.mlp.w3", C, HIDDEN)
        else:
            state |= linear(f"{block}.mlp.fc1", HIDDEN, C) | linear(f"{block}.mlp.fc2", C, HIDDEN)
        if extras:
            state |= {f"{block}.ls1.gamma": noise(C), f"{block}.ls2.gamma": noise(C)}
    if extras:
        state |= {"patch_generator.embedder.bias": noise(C)} | norm("norm")
    return state


def public(state: dict[str, Tensor], prefix: str = "base_model.") -> dict[str, Tensor]:
    conditioner = {"norm_mean": MEAN, "norm_std": STD}
    tensors = {f"{prefix}{k}": v.float() for k, v in state.items()}
    root = "radio_model." if prefix.startswith("radio_model.") else ""
    return tensors | {
        f"{root}input_conditioner.{k}": torch.tensor(v).view(3, 1, 1)
        for k, v in conditioner.items()
    }


def write(path: Path, tensors: dict[str, Tensor], **changes: Any) -> str:
    torch.save({"args": argparse.Namespace(**ARGS | changes), "state_dict": tensors}, path)
    return str(path)


def build(weights: str | None, device: str | None = None, **value: Any) -> Any:
    value = {"kind": "radio", "weights": weights, "resolution": [8, 12]} | value
    return build_teacher(parse_teacher(value), device=device)


def table_at(table: Tensor, y: float, x: float) -> Tensor:
    """Bilinear, in cells from the first one's centre, the border repeated."""
    y, x = min(max(y, 0), SIDE - 1), min(max(x, 0), SIDE - 1)
    top, left = min(int(y), SIDE - 2), min(int(x), SIDE - 2)
    fy, fx = y - top, x - left
    return (1 - fy) * ((1 - fx) * table[top, left] + fx * table[top, left + 1]) + fy * (
        (1 - fx) * table[top + 1, left] + fx * table[top + 1, left + 1]
    )


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def affine(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    q, k, v = affine(x, state, f"{name}.qkv").split(C, dim=-1)
    out, d = torch.empty_like(x), C // HEADS
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        scores = (q[:, part] @ k[:, part].T) / math.sqrt(d)
        out[:, part] = (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, part]
    return affine(out, state, f"{name}.proj")


def mlp(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.w12.weight" in state:
        gate, value = affine(x, state, f"{name}.w12").split(HIDDEN, dim=-1)
        return affine(gate / (1 + (-gate).exp()) * value, state, f"{name}.w3")
    h = affine(x, state, f"{name}.fc1")
    return affine(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), state, f"{name}.fc2")


def restated(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """All tokens of one image (3, H, W) in [0, 1], in the order of the public model."""
    pixels = (image.double() - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(
        STD
    ).double().view(3, 1, 1)
    height, width = image.shape[1] // P, image.shape[2] // P
    square = max(height, width)
    table = state["patch_generator.pos_embed"].reshape(SIDE, SIDE, C)
    tokens = list(state["patch_generator.cls_token.token"])
    for i in range(height):
        for j in range(width):
            patch = pixels[:, i * P : (i + 1) * P, j * P : (j + 1) * P].flatten()
            token = state["patch_generator.embedder.weight"] @ patch
            token = token + state.get("patch_generator.embedder.bias", 0)
            at = ((n + 0.5) * SIDE / square - 0.5 for n in (i, j))
            tokens.append(token + table_at(table, *at))
    x = torch.stack(tokens)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        first, second = (state.get(f"{block}.ls{n}.gamma", torch.ones(())) for n in (1, 2))
        x = x + first * attention(layer_norm(x, state, f"{block}.norm1"), state, f"{block}.attn")
        x = x + second * mlp(layer_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp")
    return layer_norm(x, state, "norm") if "norm.weight" in state else x


@pytest.mark.parametrize("kind", ["plain", "extras", "gated", "gated plain"])
@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (2, 3), (7, 2), (3, 5), (1, 1)])
def test_features_are_those_of_a_slow_restatement(
    kind: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    extras = kind in ("extras", "gated")
    state = trunk(gated="gated" in kind, extras=extras)
    changes: dict[str, Any] = {"model_norm": extras}
    if "gated" in kind:
        kwargs = ARGS["model_kwargs"] | {"mlp_ratio": 2 * HIDDEN / C}
        changes |= {"model": "a_student_of_dinov2", "model_kwargs": kwargs}
    teacher = build(write(tmp_path / "r.pth.tar", public(state), **changes))
    images = torch.rand(2, 3, grid[0] * P, grid[1] * P)
    summary, spatial = teacher(images)
    for n, image in enumerate(images):
        tokens = restated(state, image)
        due = tokens[5:].T.reshape(C, *grid)
        torch.testing.assert_close(spatial[n].double(), due, rtol=1e-4, atol=1e-4)
        summaries = torch.cat([tokens[0], tokens[2]])  # SAM's, the second, is not one
        torch.testing.assert_close(summary[n].double(), summaries, rtol=1e-4, atol=1e-4)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "radio.pth.tar", public(trunk()))


def test_a_checkpoint_keeps_the_contract_of_teachers(file: str) -> None:
    teacher = build(file)
    check_teacher(teacher)
    assert teacher.normalization == (pytest.approx(MEAN), pytest.approx(STD))
    assert (teacher.spec.summary_dim, teacher.spec.spatial_dim, teacher.spec.patch_size) == (
        *(2 * C, C, P),
    )


def hub(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    """A folder as the hub has it: the trunk below `radio_model.model.`, gammas renamed."""
    folder.mkdir()
    renamed = {k.replace(".gamma", ".grandma"): v for k, v in state.items()}
    tensors = public(renamed, "radio_model.model.")
    tensors |= {"radio_model.summary_idxs": torch.tensor([0, 2])} | changes.pop("tensors", {})
    save_file(tensors, folder / "model.safetensors")
    args = {k: v for k, v in (ARGS | changes).items() if k != "dtype"}
    (folder / "config.json").write_text(json.dumps({"args": args}))
    return folder


def test_a_file_of_the_hub_is_the_same_model(tmp_path: Path) -> None:
    state = trunk(extras=True)
    due = build(write(tmp_path / "r.pt", public(state), model_norm=True))
    folder = hub(tmp_path / "hub", state, model_norm=True)
    images = torch.rand(1, 3, 8, 12)
    for weights in (folder, folder / "model.safetensors"):
        came = build(str(weights))
        assert torch.equal(came(images).spatial, due(images).spatial)
        assert torch.equal(came(images).summary, due(images).summary)
    wrong = {"radio_model.summary_idxs": torch.tensor([0, 1])}
    with pytest.raises(TeacherError, match=r"summary_idxs: expected .* \[0, 2\] .* got \[0, 1\]"):
        build(str(hub(tmp_path / "other", state, model_norm=True, tensors=wrong)))
    (folder / "config.json").unlink()
    with pytest.raises(TeacherError, match="config.json is missing"):
        build(str(folder))


def test_layers_are_the_patch_tokens_of_blocks(file: str) -> None:
    teacher, images = build(file), torch.rand(1, 3, 8, 12)
    first, last = teacher.layers(images, [0, 1])
    assert torch.equal(last, teacher(images).spatial)
    assert first.shape == last.shape
    assert not torch.equal(first, last)


def test_timms_own_reader_of_the_hubs_files_agrees(tmp_path: Path) -> None:
    """timm's C-RADIOv3-L in small, with the converter that timm loads the hub's files by."""
    state = {k: v for k, v in trunk(extras=True).items() if not k.startswith("norm.")}
    del state["patch_generator.embedder.bias"]
    folder = hub(tmp_path / "hub", state)
    shape = ARGS["model_kwargs"] | {"patch_size": P, "pos_embed_grid_size": (SIDE, SIDE)}
    theirs = timm.create_model(
        "naflexvit_large_patch16_radio_v3",
        **shape,
        **{"reg_tokens": 4, "init_values": 1.0, "num_classes": 0},
        pretrained=True,
        pretrained_cfg_overlay={"file": str(folder / "model.safetensors")},
    ).eval()
    ours = build(str(folder))
    images = torch.rand(1, 3, 12, 28)
    with torch.no_grad():
        tokens = theirs.forward_features((images - ours.mean) / ours.std)
    summary, spatial = ours(images)
    torch.testing.assert_close(summary, tokens[:, [0, 2]].flatten(1), rtol=1e-5, atol=1e-5)
    due = tokens[:, 5:].transpose(1, 2).unflatten(2, (3, 7))
    torch.testing.assert_close(spatial, due, rtol=1e-5, atol=1e-5)


def test_the_hubs_config_states_the_size_and_what_is_not_followed_is_said(
    tmp_path: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub(tmp_path / "hub", trunk())
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"preferred_resolution": [16, 24]}))
    assert build(str(folder), resolution=None).spec.resolution == (16, 24)
    assert build(str(folder), "meta", resolution=None).spec.resolution == (16, 24)
    assert said() == []
    small = read_radio(folder).architecture
    monkeypatch.setitem(PUBLISHED, "radio_v2.5-b", (small, 32))
    named = build(str(folder), model="radio_v2.5-b", resolution=None)
    assert named.spec.resolution == (32, 32)
    (line,) = said()
    assert line.startswith("radio radio_v2.5-b: resolution [32, 32], as published, is taken; the ")
    assert line.endswith("states [16, 24]")
    path.write_text(json.dumps(config | {"vitdet_window_size": 16}))
    build(str(folder))
    (line,) = said()
    assert "vitdet_window_size 16 of its config.json is not followed" in line
    path.write_text(json.dumps(config | {"preferred_resolution": 16}))
    with pytest.raises(TeacherError, match=r"preferred_resolution: expected \[height, width\]"):
        build(str(folder))


def test_the_averaged_weights_win_and_that_is_said(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    state = public(trunk())
    other = {k: v if "conditioner" in k else v + 1 for k, v in state.items()}
    path = tmp_path / "r.pth"
    torch.save(
        {"args": argparse.Namespace(**ARGS), "state_dict": other, "state_dict_ema": state}, path
    )
    images = torch.rand(1, 3, 8, 12)
    due = build(write(tmp_path / "plain.pth", state))(images)
    assert torch.equal(build(str(path))(images).spatial, due.spatial)
    (line,) = said()
    assert line.startswith(f"weights {path}: took state_dict_ema of [state_dict_ema, state_dict]")


@pytest.mark.parametrize(
    "stated", [[1], {"clip": 2}, {"clip": {"feature": {"upsample_factor": "2"}}}]
)
def test_dimensions_of_an_adaptor_that_make_no_sense_are_refused(
    stated: Any, tmp_path: Path
) -> None:
    folder = hub(tmp_path / "hub", trunk())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adaptor_configs": stated}))
    with pytest.raises(TeacherError, match="adaptor_configs: .*clip.* got"):
        build(str(folder))


def test_a_recipe_may_choose_the_class_tokens(file: str) -> None:
    images = torch.rand(1, 3, 8, 12)
    tokens = restated(trunk(), images[0])
    for names, places in ((["sam"], [1]), (["dino", "sam", "clip"], [2, 1, 0])):
        teacher = build(file, summary=names)
        due = tokens[places].flatten()[None]
        assert teacher.spec.summary_dim == len(names) * C
        torch.testing.assert_close(teacher(images).summary.double(), due, rtol=1e-4, atol=1e-4)
    with pytest.raises(TeacherError, match=r"no class token of 'cilp' \(did you mean 'clip'\?\)"):
        build(file, summary=["cilp"])


def test_teachers_may_share_one_class_token(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"cls_token_per_teacher": False, "teachers": [{"type": "clip"}]}
    changes |= {"register_multiple": None, "cpe_num_registers": 4}
    teacher = build(write(tmp_path / "r.pt", public(trunk()), **changes))
    images = torch.rand(1, 3, 8, 12)
    due = restated(trunk(), images[0])[:1]
    torch.testing.assert_close(teacher(images).summary.double(), due, rtol=1e-4, atol=1e-4)


def test_a_teacher_named_twice_has_one_class_token(tmp_path: Path) -> None:
    again = {"name": "sam", "type": "sam", "use_summary": True}
    teacher = build(write(tmp_path / "r.pt", public(trunk()), teachers=[*TEACHERS, again]))
    assert teacher.slots == (0, 1, 2)


@pytest.mark.parametrize(
    "class_tokens, multiple, registers", [(3, 16, 13), (4, 8, 4), (8, 8, 8), (3, 10, 7)]
)
def test_registers_fill_a_multiple_and_all_of_it_where_nothing_is_missing(
    class_tokens: int, multiple: int, registers: int, tmp_path: Path
) -> None:
    """C-RADIO fills class tokens and registers up to a multiple (`register_multiple`)."""
    teachers = [{"name": f"t{i}", "type": "any"} for i in range(class_tokens)]
    state = public(trunk(tokens=class_tokens + registers))
    changes = {"register_multiple": multiple, "teachers": teachers}
    teacher = build(write(tmp_path / "r.pt", state, **changes))
    assert teacher(torch.rand(1, 3, 8, 12)).summary.shape == (1, class_tokens * C)
    short = public(trunk(tokens=class_tokens + registers - 1))
    with pytest.raises(
        TeacherError, match=f"registers is {registers - 1}, but {registers} in its args"
    ):
        build(write(tmp_path / "short.pt", short, **changes))


def test_heads_are_left_out_by_name(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    heads = {f"_{kind}.clip.fc1.weight": torch.ones(3, C) for kind in ("heads", "feature_projections")}  # noqa: E501  # fmt: skip
    plain = build(write(tmp_path / "plain.pt", public(trunk())))
    came = build(write(tmp_path / "heads.pt", public(trunk()) | heads))
    assert teacher_fingerprint(plain) == teacher_fingerprint(came)
    adaptors = {
        f"radio_model.adaptors.{name}.fc1.weight": torch.ones(3, C)
        for name in ("clip.head_mlp", "clip.feat_mlp", "dino.feat_mlp", "dino.other")
    }
    on_hub = build(str(hub(tmp_path / "hub", trunk(), tensors=adaptors)))
    images = torch.rand(1, 3, 8, 12)
    assert torch.equal(on_hub(images).spatial, plain(images).spatial)
    assert said() == [
        f"weights {tmp_path / file}: its heads for {names} are not read: the features are the "
        "backbone's own"
        for file, names in (("heads.pt", "clip"), ("hub", "clip, dino"))
    ]


def test_the_fingerprint_follows_the_weights_and_the_choice_of_tokens(
    file: str, tmp_path: Path
) -> None:
    due = teacher_fingerprint(build(file))
    assert teacher_fingerprint(build(file)) == due
    assert teacher_fingerprint(build(file, summary=["sam", "dino"])) != due
    other = public(trunk())
    other["base_model.blocks.1.mlp.fc2.bias"][0] += 1
    assert teacher_fingerprint(build(write(tmp_path / "o.pt", other))) != due


def test_bfloat16_weights_and_computation_stay_close(tmp_path: Path) -> None:
    halves = {k: v if "conditioner" in k else v.bfloat16() for k, v in public(trunk()).items()}
    images = torch.rand(1, 3, 8, 20)
    due = build(write(tmp_path / "full.pt", {k: v.float() for k, v in halves.items()}))(images)
    path = write(tmp_path / "half.pt", halves, dtype=torch.bfloat16)
    stored = build(path)
    assert torch.equal(stored(images).spatial, due.spatial)
    came = stored.cast(torch.bfloat16)(images)
    assert came.spatial.dtype == came.summary.dtype == torch.float32
    for a, b in zip(came, due, strict=True):
        assert 0 < (a - b).norm() < 0.02 * b.norm()


def test_every_tensor_of_the_trunk_is_needed(tmp_path: Path) -> None:
    state = public(trunk(extras=True))
    optional = {"base_model.patch_generator.embedder.bias"}
    for name in state.keys() - optional:
        part = {k: v for k, v in state.items() if k != name}
        due = "final norm" if name == "base_model.norm.weight" else name.removeprefix("base_model.")
        with pytest.raises(TeacherError, match=due):
            build(write(tmp_path / "r.pt", part, model_norm=True))


@pytest.mark.parametrize(
    "name, message",
    [
        ("base_model.blocks.2.norm1.weight", "Unexpected key.*blocks.2.norm1.weight"),
        ("base_model.patch_generator.patch_normalizer.weight", "Unexpected.*patch_normalizer"),
        ("base_model.blocks.0.attn.q_norm.weight", "Unexpected.*q_norm"),
        ("_feature_normalizer.mean", "normalises its features ._feature_normalizer.mean"),
        ("neck.weight", "holds unknown tensors: neck.weight"),
        (
            "base_model.blocks.0.mlp.fc1.parametrizations.weight.original",
            "fc1.parametrizations.weight.original belongs to a parametrization",
        ),
    ],
)
def test_a_tensor_that_is_not_known_is_refused_by_name(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        build(write(tmp_path / "r.pt", public(trunk()) | {name: torch.ones(C)}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cpe_max_size": 64}, "position table's side in pixels is 20, but 64 in its args"),
        ({"cpe_max_size": None}, "is 20, but None in its args"),
        ({"model_norm": True}, "final norm is False, but True in its args"),
        ({"model": "vit_tinny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"model": "hf-hub:someone/vit"}, "is neither a timm model"),
        ({"model": "resnet18"}, "timm's 'resnet18' is not a ViT"),
        (
            {"model": "vit_base_patch16_rope_224", "model_kwargs": {}},
            "is not a ViT with a position",
        ),
        (
            {"model": "vit_huge_patch16_224", "model_kwargs": {}},
            "does not fit the.*Missing key.*blocks.2",
        ),
        ({"model_kwargs": {"checkpoint_path": "x"}}, "model_kwargs: checkpoint_path of 'vit_tiny"),
        ({"teachers": [{"name": "sam", "use_summary": False}]}, "no teacher in its args has a sum"),
        (
            {"teachers": [*TEACHERS[:2], {"name": "dino", "token_slot": 0}]},
            "'dino' has token_slot 0, expected its place",
        ),
        ({"teachers": [{"type": "sam"}]}, "a teacher in its args has no name"),
        ({"initial_checkpoint": Path("x")}, "pathlib.*, which is not unpickled"),
    ],
)
def test_args_that_do_not_fit_the_file_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        build(write(tmp_path / "r.pt", public(trunk()), **changes))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("patch_generator.embedder.weight", (C, 50)),
        ("patch_generator.pos_embed", (1, 24, C)),
        ("patch_generator.pos_embed", (25, C)),
        ("patch_generator.cls_token.token", (5, C + 1)),
    ],
)
def test_shapes_that_make_no_trunk_are_refused(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=r"expected the shapes \(C, 3 \* p \* p\)"):
        build(write(tmp_path / "r.pt", public(trunk() | {name: noise(*shape)})))


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_a_file_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TeacherError, match="which is not unpickled"):
        build(write(tmp_path / "r.pt", public(trunk()), trap=Trap()))
    assert not Path("sprung").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.pt"
    contents: list[tuple[Any, str]] = [
        (torch.ones(3), "neither state_dict_ema nor state_dict"),
        ({"state_dict": {}}, "has no args that name a model"),
        ({"args": ARGS}, "neither state_dict_ema nor state_dict"),
        ({"state_dict": public(trunk())}, "has no args that name a model"),
        ({"state_dict": public(trunk()), "args": {"epochs": 3}}, "has no args that name a model"),
        (
            {"state_dict": {"base_model.patch_embed.proj.weight": torch.ones(1)}, "args": ARGS},
            r"one tensor named \*.patch_generator.embedder.weight, got 0",
        ),
    ]
    for content, message in contents:
        torch.save(content, path)
        with pytest.raises(TeacherError, match=message):
            build(str(path))
    path.write_bytes(b"nothing at all")
    with pytest.raises(TeacherError, match="is not unpickled|cannot be read"):
        build(str(path))
    with pytest.raises(TeacherError, match="nowhere.pt is not a file or directory"):
        build(str(tmp_path / "nowhere.pt"))


def test_a_recipe_that_says_too_little_is_told_what_is_missing(file: str) -> None:
    with pytest.raises(TeacherError, match="model: missing, and so are weights"):
        build(None)
    with pytest.raises(TeacherError, match="did you mean 'radio_v2.5-l'"):
        build("none", model="radio_v25-l")
    with pytest.raises(TeacherError, match=r"`hf download nvidia/RADIO-L --local-dir DIR`"):
        build(None, model="radio_v2.5-l")
    with pytest.raises(TeacherError, match="resolution: missing; .* multiples of 4 px"):
        build(file, resolution=None)
    with pytest.raises(TeacherError, match=r"\(8, 10\) is not a multiple of the 4 px patch"):
        build(file, resolution=[8, 10])
    with pytest.raises(TeacherError, match="spatial_dim=16.*'radio_v2.5-b' has.*_dim=768"):
        build(file, model="radio_v2.5-b", resolution=[224, 224])


def test_on_meta_a_published_model_needs_no_file_and_an_unknown_one_reads_it(file: str) -> None:
    named = build("not/here.pth.tar", "meta", model="radio_v2.5-l", resolution=[512, 512])
    assert named(torch.empty(1, 3, 512, 512, device="meta")).spatial.shape == (1, 1024, 32, 32)
    unknown = build(file, "meta")
    check_teacher(unknown)
    assert unknown.spec == build(file).spec


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_what_its_spec_says(name: str) -> None:
    teacher = build("none", "meta", model=name, resolution=None)
    check_teacher(teacher)
    giant = name == "radio_v2.5-g"  # from DINOv2, and so its pixels
    pixels = (IMAGENET_MEAN, IMAGENET_STD) if giant else (OPENAI_MEAN, OPENAI_STD)
    assert teacher.normalization == pixels
    assert teacher.spec.patch_size * 128 == (1792 if giant else 2048)
    side = {"radio_v2.5": 896 if giant else 768}.get(name[:-2], 512)
    assert teacher.spec.resolution == (side, side)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(n for n in PUBLISHED if n.startswith("c-")))
def test_c_radio_is_timms_model_of_that_name_tensor_for_tensor(name: str) -> None:
    family, size = name.removeprefix("c-radio_").split("-")
    size = {"b": "base", "l": "large", "h": "huge", "g": "giant"}.get(size, size)
    with torch.device("meta"):
        ours = build_trunk(PUBLISHED[name][0]).state_dict()
        theirs = timm.create_model(f"naflexvit_{size}_patch16_radio_{family}", num_classes=0)
    due = {k: v.shape for k, v in theirs.state_dict().items()}
    assert due.pop("embeds.proj.bias") == due["embeds.cls_token"][-1:]  # zeros there, absent here
    assert {k: v.shape for k, v in ours.items()} == due
