"""RADIO checkpoints as students: the way back, other people's files, and a whole run from one."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.formats.export import export_student
from distill.formats.radio import save_radio
from distill.formats.radio_reader import read_radio_student
from distill.runtime.errors import RecipeError
from student.config import HeadConfig, StudentConfig
from student.initial import build as build_student
from student.model import Student
from student.storage import StudentFile, load_student, student_of
from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.fingerprint import teacher_fingerprint
from teachers.phi_s import FeatureStatistics, fit_phi_s
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.trained import UpsamplerCard, save_upsampler
from tests.tiny_export import TARGETS, build, export, outputs, write_run
from tests.tiny_run import plain_command, run, write_recipe

ATTENTIVE = HeadConfig(hidden_dim=12, num_layers=1, attention_blocks=2)  # as C-RADIOv4's


def saved(path: Path, **changes: Any) -> Student:
    student = build(**changes)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = dict(student.state_dict())
    save_radio(path, StudentFile(student.config, student.targets, state, {}))
    return student


def rewrite(path: Path, rename: dict[str, str], **args: Any) -> None:
    """Renames tensors by prefix, drops those renamed to nothing, and changes args."""
    loaded = torch.load(path, weights_only=False)
    state: dict[str, Tensor] = {}
    for key, value in loaded["state_dict"].items():
        for old, new in rename.items():
            if key.startswith(old):
                key = key.replace(old, new, 1) if new else ""
        if key:
            state[key] = value
    args = vars(loaded["args"]) | args
    torch.save({"args": argparse.Namespace(**args), "state_dict": state}, path)


def read(path: Path) -> Student:
    file = read_radio_student(path)
    return student_of(file.config, file.targets, file.state_dict, "the file")


@pytest.mark.long
@pytest.mark.parametrize("size", [(24, 24), (8, 20), (32, 12)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 0, "layer_scale": 0.1, "final_norm": True},
        {"register_multiple": 8, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        {"layer_scale": 0.1, "head": ATTENTIVE},
    ],
    ids=str,
)
def test_backbone_and_heads_come_back_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    student = saved(tmp_path / "s", **changes)
    images, again = torch.rand(2, 3, *size), read(tmp_path / "s")
    assert again.config.head == student.config.head
    expected, actual = outputs(student, images), outputs(again, images)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    entry = {"kind": "radio", "weights": str(tmp_path / "s"), "resolution": [24, 24]}
    summary, spatial = build_teacher(parse_teacher(entry))(images)
    assert torch.equal(summary, expected["backbone/summary"])
    assert torch.equal(spatial, expected["backbone/spatial"])


def test_an_exported_checkpoint_is_the_folded_student_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build())
    folded = export(checkpoint, tmp_path / "s", heads=("clip",), teacher_space=True)
    export_student(checkpoint, tmp_path / "s.pth", format="radio", heads=("clip",))
    again = export(tmp_path / "s.pth", tmp_path / "t")
    images = torch.rand(1, 3, 8, 20)
    expected, actual = outputs(folded, images), outputs(again, images)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert list(again.targets) == list(TARGETS)


def test_heads_by_number_are_read_and_those_of_another_make_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = saved(tmp_path / "s")
    number = {
        "_heads.siglip.": "_heads.0.",
        "_feature_projections.siglip.": "_feature_projections.0.",
    }
    old = {"_feature_projections.clip.final": "_feature_projections.clip.fc2"}  # MLP version v1
    rewrite(tmp_path / "s", number | old | {"_feature_projections.muted.": ""})
    actual = read(tmp_path / "s")
    assert list(actual.heads) == ["siglip"]
    assert "left out the head of clip, no MLP v2 or attn of the first's size" in caplog.text
    images = torch.rand(1, 3, 8, 20)
    expected = outputs(student, images)
    for name, value in outputs(actual, images).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("head", [None, ATTENTIVE], ids=["v2", "attn"])
def test_adaptors_in_a_folder_of_the_hub_are_heads(
    head: HeadConfig | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As RADIO's own script writes them, with another one whose teacher is not there."""
    student = saved(tmp_path / "s", **({"head": head} if head else {}))
    folder = write_hub(tmp_path / "s", tmp_path / "hub")
    images = torch.rand(2, 3, 8, 20)
    expected, actual = outputs(student, images), outputs(read(folder), images)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert "left out the head of stranger: it is no teacher" in caplog.text


def write_hub(file: Path, folder: Path) -> Path:
    """A file of the public format as a folder of the hub with adaptors."""
    loaded = torch.load(file, weights_only=False)
    args = vars(loaded["args"])
    kinds = {"_heads.": "head_mlp", "_feature_projections.": "feat_mlp"}
    tensors: dict[str, Tensor] = {"adaptors.stranger.head_mlp.fc1.weight": torch.ones(2, 2)}
    for name, value in loaded["state_dict"].items():
        for prefix, kind in kinds.items():
            if name.startswith(prefix):
                teacher, _, rest = name.removeprefix(prefix).partition(".")
                name = f"adaptors.{teacher}.{kind}.{rest.replace('.gamma', '.grandma')}"
        tensors[name.replace("base_model.", "model.")] = value
    folder.mkdir()
    save_file({f"radio_model.{k}": v for k, v in tensors.items()}, folder / "model.safetensors")
    upsample = {t["name"]: t.pop("fd_upsample_factor", None) for t in args["teachers"]}
    configs = {name: {"feature": {"upsample_factor": u}} for name, u in upsample.items()}
    args = {k: v for k, v in args.items() if k != "dtype"}
    config = {"args": args, "adaptor_names": [*upsample], "adaptor_configs": configs}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_attention_heads_of_another_make_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = saved(tmp_path / "s", head=ATTENTIVE)
    heads = "_feature_projections"
    missing = {f"{heads}.clip.blocks.1.norm2.bias": "", f"{heads}.siglip.mlp.fc1.bias": ""}
    rewrite(tmp_path / "s", missing)
    actual = read(tmp_path / "s")
    assert list(actual.heads) == ["muted"]
    for name in ("clip", "siglip"):
        assert f"left out the head of {name}, no MLP v2 or attn" in caplog.text
    images = torch.rand(1, 3, 8, 20)
    due = outputs(student, images)["muted/spatial"]
    assert torch.equal(outputs(actual, images)["muted/spatial"], due)


@pytest.mark.parametrize(
    ("rename", "args", "message"),
    [
        ({}, {"cls_token_per_teacher": False, "cpe_num_registers": 6}, "share one class token"),
        ({"base_model.blocks.1.attn.qkv.bias": ""}, {}, "qkv.bias has shape None, expected"),
        ({}, {"model": "vit_base_patch16_clip_quickgelu_224"}, "quickgelu_224 has QuickGELU"),
    ],
)
def test_a_trunk_that_is_no_students_is_refused(
    tmp_path: Path, rename: dict[str, str], args: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "s")
    rewrite(tmp_path / "s", rename, **args)
    with pytest.raises(RecipeError, match=message):
        read_radio_student(tmp_path / "s")


def test_what_the_format_cannot_hold_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(path: Path, file: StudentFile) -> None:
        state = dict(file.state_dict)
        state["heads.clip.summary.fc1.bias"] = state["heads.clip.summary.fc1.bias"] + 1
        save_radio(path, file._replace(state_dict=state))

    monkeypatch.setattr("distill.formats.export.save_radio", lossy)
    checkpoint = write_run(tmp_path, build())
    out = tmp_path / "out" / "s.pth"
    with pytest.raises(
        RecipeError, match="cannot hold this student; readers would get another clip"
    ):
        export_student(checkpoint, out, format="radio", heads=("clip",))
    assert not list(out.parent.iterdir())


def test_what_is_neither_a_run_nor_a_file_of_a_known_format_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(TeacherError, match="not a RADIO checkpoint"):
        export_student(tmp_path / "x.pth", tmp_path / "s")
    with pytest.raises(TeacherError, match="gone is not a file or directory"):
        export_student(tmp_path / "gone", tmp_path / "s")


def test_a_new_student_starts_from_its_trunk_and_fresh_heads(tmp_path: Path) -> None:
    source = saved(tmp_path / "s.pth")
    export_student(tmp_path / "s.pth", tmp_path / "s")
    init = {"kind": "student", "path": tmp_path / "s", "heads": False}
    config = StudentConfig(**(source.config.model_dump(exclude={"mean", "std"}) | {"init": init}))
    started = build_student(config, TARGETS).eval()
    for name, value in source.trunk.state_dict().items():
        assert torch.equal(started.trunk.state_dict()[name], value)
    images = torch.rand(1, 3, 8, 20)
    expected, actual = outputs(source, images), outputs(started, images)
    assert torch.equal(actual["backbone/spatial"], expected["backbone/spatial"])
    assert not torch.equal(actual["clip/spatial"], expected["clip/spatial"])


def save_featsharp(path: Path, entry: dict[str, Any]) -> None:
    """One of random weights, as if it had been trained for a teacher."""
    teacher = build_teacher(parse_teacher(entry))
    sharp = {"kind": "featsharp", "factor": 2, "num_heads": 4}
    config = parse_upsampler(sharp)
    assert config is not None
    statistics = FeatureStatistics.zeros(teacher.spec.spatial_dim)
    statistics.update(torch.randn(300, teacher.spec.spatial_dim))
    inner = build_upsampler(config, teacher.spec)
    upsampler = Standardised(inner, fit_phi_s(statistics), bias=True)
    card = UpsamplerCard(
        upsampler=sharp,
        bias=True,
        spec=teacher.spec,
        teacher=entry,
        fingerprint=teacher_fingerprint(teacher),
    )
    save_upsampler(path, upsampler.state_dict(), card)


@pytest.mark.process
def test_a_run_takes_one_as_teacher_with_featsharp_and_as_its_start(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"steps": 2})
    assert (done := run(plain_command(recipe), tmp_path)).returncode == 0, done.stderr
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    export_student(path, tmp_path / "radio.pth", format="radio")
    export_student(tmp_path / "radio.pth", tmp_path / "start.safetensors")
    radio = {"kind": "radio", "weights": str(tmp_path / "radio.pth"), "resolution": [32, 32]}
    save_featsharp(tmp_path / "sharp.safetensors", radio)
    entry = radio | {"upsampler": str(tmp_path / "sharp.safetensors")}
    init = {"kind": "student", "path": str(tmp_path / "start.safetensors"), "heads": False}
    second = write_recipe(
        tmp_path,
        run={"steps": 2, "dir": str(tmp_path / "second")},
        teachers={"expert": entry},
        student={"init": init},
        optimizer={"lr": 1e-9},
        schedule={"warmup_steps": 0},
    )
    assert (done := run(plain_command(second), tmp_path)).returncode == 0, done.stderr
    actual = load_student(tmp_path / "second/checkpoints/step-00000002/student.safetensors")
    start = load_student(tmp_path / "start.safetensors")
    for name, value in start.trunk.state_dict().items():
        torch.testing.assert_close(actual.trunk.state_dict()[name], value, atol=1e-6, rtol=0)
    assert actual.targets["expert"].spatial_dim == start.spec.spatial_dim
    assert actual.targets["expert"].native_grid == (4, 4)  # FeatSharp made it of 2 x 2
