"""RADIO in transformers' own layout: written by transformers, read as teacher and as student."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.formats.radio import save_radio
from distill.formats.radio_reader import read_radio_student
from distill.runtime.errors import RecipeError
from student.model import Student
from student.storage import StudentFile, student_of
from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.normalization import OPENAI_MEAN, OPENAI_STD
from teachers.radio_builtin import BuiltinConfig, public_args
from teachers.radio_format import read_radio
from teachers.radio_models import PUBLISHED
from tests.tiny_export import build as build_student
from tests.tiny_export import export

C, P = 18, 4
FIELDS: dict[str, Any] = {
    **{"hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.7},
    **{"patch_size": P, "max_img_size": 22, "num_cls_tokens": 3, "num_registers": 2},
    **{"summary_idxs": [0, 2], "norm_mean": [0.1, 0.2, 0.3], "norm_std": [0.4, 0.5, 0.6]},
}
SIZES = ((24, 24), (8, 20), (28, 12))
TEACHERS = [{"name": "clip"}, {"name": "sam", "use_summary": False}, {"name": "dino"}]
ARGS = {
    **{"model": "vit_tiny_patch16_224", "cpe_max_size": 20, "cls_token_per_teacher": True},
    **{"cpe_num_registers": 2, "teachers": TEACHERS},
}


def write(folder: Path, *, original: bool = True, scaled: bool = False, **changes: Any) -> Any:
    """A random model of transformers, saved by it in one of its two layouts; returns it."""
    from transformers import RadioConfig, RadioModel

    torch.manual_seed(0)
    model = RadioModel(RadioConfig(**FIELDS | changes)).eval()
    for name, parameter in model.named_parameters():
        if scaled or "lambda1" not in name:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_original_format=original)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("radio")
    write(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """One of transformers' folders, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "radio"))


def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Changes fields of a folder's config; removes keys and tensors."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not any(part in k for part in drop)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def teacher(folder: Path, **options: Any) -> Any:
    entry = {"kind": "radio", "weights": str(folder), "resolution": [24, 24], **options}
    return build_teacher(parse_teacher(entry))


def student(folder: Path) -> Student:
    file = read_radio_student(folder)
    return student_of(file.config, file.targets, file.state_dict, "the file")


def images(size: tuple[int, int]) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_alike(ours: Any, theirs: Any) -> None:
    for size in SIZES:
        due = theirs(images(size))
        summary, spatial = getattr(ours(images(size)), "backbone", ours(images(size)))
        torch.testing.assert_close(summary, due.summary, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            spatial.flatten(2).transpose(1, 2), due.features, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_teacher_and_student_give_what_transformers_gives(
    original: bool, scaled: bool, tmp_path: Path
) -> None:
    model = write(tmp_path, original=original, scaled=scaled)
    assert_alike(teacher(tmp_path), model)
    ours = student(tmp_path)
    assert_alike(ours, model)
    assert (ours.config.layer_scale is not None) == scaled
    assert (ours.config.shape.mlp_dim, ours.config.table_side) == (48, 5)
    assert list(ours.targets) == ["cls_0", "cls_1", "cls_2"]
    assert not ours.heads


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"use_swiglu_ffn": True, "mlp_ratio": 4.0}, r"gated \(SwiGLU, use_swiglu_ffn\)"),
        ({"qkv_bias": False}, r"have no bias \(qkv_bias\)"),
        ({"summary_idxs": [2, 0]}, r"summary_idxs: .*\[2, 0\]"),
        ({"num_cls_tokens": 1, "summary_idxs": [0], "num_registers": 0}, None),
    ],
)
def test_what_only_a_teacher_can_be_is_no_student(
    original: bool, changes: dict[str, Any], refusal: str | None, tmp_path: Path
) -> None:
    model = write(tmp_path, original=original, **changes)
    assert_alike(teacher(tmp_path), model)
    if refusal is None:
        assert_alike(student(tmp_path), model)
    else:
        with pytest.raises(RecipeError, match=refusal):
            read_radio_student(tmp_path)


def test_a_scale_that_is_not_in_the_file_is_that_of_the_config(folder: Path) -> None:
    from transformers import RadioModel

    edit(folder, ("lambda1",), layerscale_value=0.3)
    assert_alike(teacher(folder), RadioModel.from_pretrained(folder).eval())


def test_a_config_without_a_field_has_transformers_default(tmp_path: Path) -> None:
    from transformers import RadioModel

    write(tmp_path, norm_mean=OPENAI_MEAN, norm_std=OPENAI_STD, summary_idxs=[0, 1])
    edit(tmp_path, ("norm_mean", "norm_std", "summary_idxs", "qkv_bias", "hidden_act"))
    assert_alike(teacher(tmp_path), RadioModel.from_pretrained(tmp_path).eval())


def test_the_defaults_are_transformers_and_those_of_c_radio_v4_h() -> None:
    from transformers import RadioConfig

    ours, theirs = BuiltinConfig(), RadioConfig()
    for name, value in ours.model_dump(exclude={"head_dim", "summary_idxs"}).items():
        due = getattr(theirs, name)
        assert value == (tuple(due) if isinstance(due, list) else due), name
    assert list(ours.summary) == theirs.summary_idxs
    args = public_args(ours, {}, Path("model.safetensors"))
    published, _ = PUBLISHED["c-radio_v4-h"]
    assert args["cpe_max_size"] == published.table_side * published.patch_size
    assert args["cpe_num_registers"] == published.registers
    shown = [teacher["use_summary"] for teacher in args["teachers"]]
    assert shown == [name in published.summary for name in published.class_tokens]
    assert (ours.norm_mean, ours.norm_std) == (published.mean, published.std)


def test_args_beside_the_fields_name_the_class_tokens(tmp_path: Path) -> None:
    """As our own export writes both."""
    model = write(tmp_path)
    ours = teacher(edit(tmp_path, args=ARGS), summary=["dino", "clip"])
    assert_alike(teacher(tmp_path), model)
    swapped = ours(images((8, 20))).summary.unflatten(1, (2, C)).flip(1).flatten(1)
    assert torch.equal(swapped, teacher(tmp_path)(images((8, 20))).summary)
    assert_alike(export(tmp_path, tmp_path / "start.safetensors"), model)
    file = read_radio_student(tmp_path)
    assert [t.summary_dim is None for t in file.targets.values()] == [False, True, False]
    assert list(file.targets) == ["clip", "sam", "dino"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": TEACHERS[:2]}, "num_cls_tokens means 3, but its args mean 2"),
        ({"teachers": [*TEACHERS[1:], TEACHERS[0]]}, r"means \[0, 2\], .* mean \[1, 2\]"),
        ({"cpe_num_registers": 4}, "num_registers means 2, but its args mean 4"),
        ({"cpe_max_size": 24}, "max_img_size means 20, but its args mean 24"),
        ({"model": None}, "has no args that name a model"),
    ],
)
def test_args_that_say_other_things_than_the_fields_are_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        read_radio(edit(folder, args=ARGS | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "config.json: hidden_act: .*'gelu', got 'silu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: .*, got 1e-05"),
        ({"num_channels": 4}, "num_channels: .* 3, got 4"),
        ({"video_temporal_patch_size": 2}, "video_temporal_patch_size: .*got 2"),
        ({"head_dim": 8}, "hidden_size 18 is not num_attention_heads 2 times head_dim 8"),
        ({"summary_idxs": [0, 3]}, r"summary_idxs \[0, 3\]: there are 3 class tokens"),
        ({"summary_idxs": [0, 1]}, r"expected the class tokens \[0, 1\] .*, got \[0, 2\]"),
        ({"hidden_size": 36}, "embedder.weight has the shape .*, but hidden_size and patch_size"),
        ({"max_img_size": 24}, "max_img_size and patch_size of its config.json make it .*36"),
        ({"num_registers": 3}, "num_cls_tokens and num_registers of its .* make it .6, 18"),
        ({"mlp_ratio": 2.6}, r"mlp.fc2.weight .* \(18, 48\), but mlp_ratio .* \(18, 46\)"),
        ({"num_hidden_layers": 3}, "has 2 blocks, but num_hidden_layers .* is 3"),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_refused_by_its_key(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        read_radio(edit(folder, **changes))


def test_under_a_published_name_the_class_tokens_have_its_teachers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    small = read_radio(edit(folder, args=ARGS)).architecture
    monkeypatch.setitem(PUBLISHED, "c-radio_v4-h", (small, 24))
    edit(folder, ("args",))
    named = teacher(folder, model="c-radio_v4-h", summary=["dino"])
    assert named.slots == (2,)
    assert named.spec.summary_from == "class tokens of dino"
    (line,) = said()
    assert line.endswith("names no teachers; those of c-radio_v4-h are assumed: clip, sam, dino")


def test_pixels_are_those_of_the_tensors_as_in_transformers_and_a_conflict_is_said(
    folder: Path, said: Callable[[], list[str]]
) -> None:
    """As after `save_pretrained` of a model in bfloat16, whose buffers are rounded."""
    from transformers import RadioModel

    assert_alike(teacher(folder), RadioModel.from_pretrained(folder).eval())
    assert said() == []
    edit(folder, norm_mean=[0.1, 0.2, 0.31])
    assert_alike(teacher(folder), RadioModel.from_pretrained(folder).eval())
    (line,) = said()
    assert (
        "mean [0.1, 0.2, 0.3] of its tensors is taken; its config.json states [0.1, 0.2, 0.31]"
        in line
    )


def test_the_kind_for_any_model_of_transformers_names_that_for_radio(folder: Path) -> None:
    with pytest.raises(TeacherError, match=f"use kind: radio. weights: {folder}"):
        build_teacher(parse_teacher({"kind": "hf", "model": str(folder)}))


def test_transformers_reads_a_students_weights_as_they_are(tmp_path: Path) -> None:
    """A student by default is RADIO-shaped: the hub's names need no other change."""
    from transformers import RadioModel

    ours = build_student(mlp_ratio=2.7)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    file = StudentFile(ours.config, ours.targets, dict(ours.state_dict()), {})
    save_radio(tmp_path / "s.pth", file)
    state = torch.load(tmp_path / "s.pth", weights_only=False)["state_dict"]
    trunk = {k: v for k, v in state.items() if k.startswith(("base_model.", "input_"))}
    names = {k: f"radio_model.{k.replace('base_model.', 'model.')}" for k in trunk}
    save_file({names[k]: v for k, v in trunk.items()}, tmp_path / "model.safetensors")
    config: dict[str, Any] = {
        **{"model_type": "radio", "hidden_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "mlp_ratio": 43 / 16, "patch_size": 4, "max_img_size": 24},
        **{"num_cls_tokens": 3, "num_registers": 4, "summary_idxs": [0, 1]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = RadioModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert_alike(ours, model.eval())
    assert_alike(student(tmp_path), model)
