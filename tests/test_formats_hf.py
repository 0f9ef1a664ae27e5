"""The folder for transformers: read by the real client, by vLLM's rules, and by ourselves."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import load_checkpoint_in_model
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import student as ours
from distill.evaluation.models import parse_model
from distill.evaluation.resolution_sweep import ResolutionSweep, ResolutionSweepConfig
from distill.formats.export import export_student
from distill.formats.hf import FILES, for_hf
from distill.formats.hf_config import (
    best_size,
    exact_ratio,
    hf_config,
    preprocessor_config,
    vllm_serves,
)
from distill.formats.hf_keys import check_keys, keys
from distill.formats.radio_reader import read_radio_student
from distill.runtime.config import dump_yaml, parse_yaml
from distill.runtime.errors import RecipeError
from distill.tasks.kinds import register_kinds
from student.config import SHAPES, HeadConfig, Shape, StudentConfig
from student.initial import build as build_from
from student.model import Student
from student.storage import StudentFile, read_header
from student.timm_config import TimmStudentConfig
from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from tests import vllm_double
from tests.tiny_export import IMAGES, TARGETS, build, outputs, write_run
from tests.tiny_run import DEADLOCK_S

pytestmark = pytest.mark.long  # importing transformers takes seconds

# A class token without a summary between two with one.
ORDERED = {name: TARGETS[name] for name in ("siglip", "muted", "clip")}
SIZES = {"square": (24, 24), "wide": (8, 20), "tall": (28, 12)}  # the table has 24 x 24 px


def moved(targets: Any = ORDERED, **changes: Any) -> Student:
    """A student in which no weight is one that is lost unseen."""
    student = build(targets, **{"final_norm": False} | changes)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return student


def file_of(student: Student, **metadata: str) -> StudentFile:
    return StudentFile(student.config, student.targets, dict(student.state_dict()), metadata)


@pytest.fixture(scope="module")
def student() -> Student:
    return moved(layer_scale=0.5)


@pytest.fixture(scope="module")
def folder(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    write_run(place, student)
    export_student(place, place / "hf", format="hf")
    return place / "hf"


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_the_folder_has_five_files_that_anyone_may_read(folder: Path) -> None:
    assert sorted(each.name for each in folder.iterdir()) == sorted(FILES)
    assert len({each.stat().st_mode for each in folder.iterdir()}) == 1
    assert not list(folder.parent.glob(".hf*"))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_card_tells_how_to_load_it_and_who_serves_it(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert "AutoModel.from_pretrained('hf')" in text
    assert "vLLM cannot serve it" in text
    assert "It takes images in [0, 1]" in text


@pytest.mark.process
def test_transformers_reads_it_without_this_project(
    student: Student, folder: Path, tmp_path: Path
) -> None:
    due = {}
    for name, (height, width) in SIZES.items():
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            backbone = student(images).backbone
            maps = student.forward_intermediates(images, range(2))
        due |= {f"{name}/images": images, f"{name}/summary": backbone.summary}
        for key, each in {
            "features": backbone.spatial,
            "hidden0": maps[0],
            "hidden1": maps[1],
        }.items():
            due[f"{name}/{key}"] = each.flatten(2).transpose(1, 2)
    save_file({k: v.contiguous() for k, v in due.items()}, tmp_path / "due")
    script = Path(__file__).with_name("hf_client.py")
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, folder, tmp_path / "due", tmp_path / "again"],
        cwd=tmp_path,
        env=alone | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLOCK_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "RadioModel"
    assert found["ours imported"] == []
    for attention in ("eager", "sdpa"):
        assert found[f"{attention} keys"] == 0
        assert found[attention] <= 1e-5
        assert found[f"{attention} packed"] <= 1e-5
        assert found[f"{attention} packed, channels turned"] > 1e-3
    assert found["same weights"]
    assert found["saved again"] <= 1e-5
    assert found["accelerate"] <= 1e-5
    assert found["mapped"] <= 1e-5
    assert found["pipeline"] <= 1e-5
    assert found["pixels"] == [1, 3, 24, 24]
    assert 0 <= found["range"][0] < 0.1 < 0.9 < found["range"][1] <= 1
    assert found["runs"] == [1, 36, 16]


def test_student_load_returns_the_whole_student(student: Student, folder: Path) -> None:
    expected, came = outputs(student), outputs(ours.load(folder))
    assert expected.keys() == came.keys()
    for name, value in expected.items():  # LayerScale was folded
        torch.testing.assert_close(came[name], value, atol=1e-6, rtol=1e-6)
    assert outputs(ours.load(folder / "heads.safetensors")).keys() == came.keys()


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(hidden_dim=12, num_layers=1, upsample={"clip": 2}),
        HeadConfig(hidden_dim=8, attention_blocks=1, attention_heads=2),
    ],
    ids=["v2", "attention"],
)
def test_without_layer_scale_the_whole_student_returns_bit_for_bit(
    tmp_path: Path, head: HeadConfig
) -> None:
    student = moved(num_registers=0, head=head)
    write_run(tmp_path, student)
    export_student(tmp_path, tmp_path / "hf", format="hf")
    came = outputs(ours.load(tmp_path / "hf"))
    for name, value in outputs(student).items():
        assert torch.equal(came[name], value), name
    header = read_header(tmp_path / "hf")
    assert header.config == student.config
    assert list(header.targets) == list(student.targets)
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_registers"] == 0


def test_todays_readers_read_it_too(
    student: Student, folder: Path, said: Callable[[], list[str]]
) -> None:
    images = torch.rand(1, 3, 8, 20)
    expected = outputs(student, images)
    teacher = build_teacher(parse_teacher({"kind": "radio", "weights": str(folder)}))
    assert teacher.spec.resolution == (24, 24)
    features = teacher(images)
    torch.testing.assert_close(features.spatial, expected["backbone/spatial"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.summary, expected["backbone/summary"], atol=1e-5, rtol=0)
    assert list(read_radio_student(folder).targets) == list(ORDERED)
    with pytest.raises(TeacherError, match=f"use kind: radio. weights: {folder}"):
        build_teacher(parse_teacher({"kind": "hf", "model": str(folder)}))
    assert said() == []  # no doubt which file holds the weights


def test_vllm_reads_the_same_features(student: Student, folder: Path) -> None:
    shape = tuple(student.config.shape)
    loaded = vllm_double.load(folder, {"vit_base_patch16_224": shape})
    config = json.loads((folder / "config.json").read_text())
    assert loaded.ignored == []
    assert set(loaded.skipped) == {n for n, key in keys(config).items() if key.vllm == "skips"}
    for height, width in SIZES.values():
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            due = student(images).backbone
        tokens = loaded.encode(images)
        skip = config["num_cls_tokens"] + config["num_registers"]
        spatial = due.spatial.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[:, skip:], spatial, atol=1e-5, rtol=0)
        summary = tokens[:, config["summary_idxs"]].flatten(1)
        torch.testing.assert_close(summary, due.summary, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "registers"),
    [
        ({}, 4),
        ({"num_registers": 0}, 0),
        ({"register_multiple": 8}, 5),
        ({"num_registers": 13}, 13),
    ],
)
def test_vllms_rule_finds_the_number_of_registers(
    changes: dict[str, Any], registers: int, tmp_path: Path
) -> None:
    config = hf_config(for_hf(file_of(moved(**changes))), (24, 24))
    args = config["args"]
    assert config["num_registers"] == args["cpe_num_registers"] == registers
    found = args["register_multiple"] - 3 % args["register_multiple"] if registers else 0
    assert found == registers


@pytest.mark.parametrize("size", SHAPES)
def test_every_size_keeps_its_shape_by_name_and_by_number(size: Any) -> None:
    shape = SHAPES[size]
    small = moved()
    config = StudentConfig(size=size, final_norm=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    written = hf_config(file_of(small)._replace(config=config), (512, 512))
    assert int(written["hidden_size"] * written["mlp_ratio"]) == shape.mlp_dim
    assert written["args"]["model"] == f"vit_{size}_patch16_224"
    assert written["args"]["model_kwargs"] == {}
    assert vllm_serves(written) == (size in ("small", "base", "large", "huge"))
    if vllm_serves(written):
        assert vllm_double.DIMENSIONS[written["args"]["model"]] == shape
        assert not vllm_serves(written | {"patch_size": 14})


def test_the_mlp_ratio_is_exact_for_every_width() -> None:
    for width in range(1, 400):
        for mlp_dim in range(width, 5 * width, 7):
            assert int(width * exact_ratio(Shape(width, 1, 1, mlp_dim))) == mlp_dim


def test_the_keys_are_those_of_transformers_own_model(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = json.loads((folder / "config.json").read_text())
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    theirs = {k: tuple(v.shape) for k, v in model.state_dict().items() if "layer_scale" not in k}
    expected = {}
    for key in keys(config).values():
        first, *rest = key.shape
        for name in key.transformers:
            expected[name] = (first // len(key.transformers), *rest)
    assert expected == theirs


def test_accelerate_reads_the_files_header(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    module = torch.nn.Module()
    for name, value in names.items():
        place = module
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_buffer(last, torch.zeros_like(value))
    load_checkpoint_in_model(module, str(folder), strict=True)
    assert all(torch.equal(value, names[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_norm": True}, "student.final_norm=true"),
        ({"isolated": ("clip",)}, "student.isolated .* of clip"),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_its_key(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_run(tmp_path, moved(**changes))
    with pytest.raises(RecipeError, match=f"--format hf: .*{message}"):
        export_student(tmp_path, tmp_path / "hf", format="hf")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoints"]


def test_a_student_of_another_kind_is_refused() -> None:
    other = TimmStudentConfig(model="test_resnet")
    with pytest.raises(RecipeError, match="student.kind=timm"):
        for_hf(file_of(moved())._replace(config=other))


def test_a_folder_is_overwritten_only_by_force_and_only_if_it_is_an_export(
    folder: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", copy(folder, tmp_path / "hf")
    write_run(run, moved())
    with pytest.raises(RecipeError, match="hf already exists; --force overwrites it"):
        export_student(run, out, format="hf")
    export_student(run, out, format="hf", force=True)
    assert read_header(out).config.layer_scale is None
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match="holds thesis.tex, which no export wrote"):
        export_student(run, out, format="hf", force=True)
    with pytest.raises(RecipeError, match="is a file; name the folder to write"):
        export_student(run, out / "thesis.tex", format="hf", force=True)
    with pytest.raises(RecipeError, match="did you mean --format safetensors"):
        export_student(run, tmp_path / "new.safetensors", format="hf")
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_left_and_the_old_folder_stays_where_a_check_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", copy(folder, tmp_path / "hf")
    before = (out / "model.safetensors").read_bytes()
    write_run(run, moved())
    monkeypatch.setattr("distill.formats.hf_check.LIMIT", -1.0)
    with pytest.raises(RecipeError, match="transformers .* returns other features"):
        export_student(run, out, format="hf", force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_it_says_which_readers_were_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, moved())
    export_student(tmp_path, tmp_path / "one", format="hf")
    assert "same bits; transformers 5." in capsys.readouterr().out
    for module, told in (
        (None, "transformers is not installed"),
        (SimpleNamespace(__version__="4.57.1"), "transformers 4.57.1 has no RADIO, 5.24 does"),
    ):
        monkeypatch.setitem(sys.modules, "transformers", module)
        export_student(tmp_path, tmp_path / "two", format="hf", heads=(), force=True)
        assert f"same bits; {told}" in capsys.readouterr().out
    assert outputs(ours.load(tmp_path / "two")).keys() == {"backbone/summary", "backbone/spatial"}


def test_every_key_has_a_reader(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    out = copy(folder, tmp_path / "hf")
    path = out / "model.safetensors"

    def refused(message: str, changed: dict[str, Any], header: Any = None, **args: Any) -> None:
        save_file(changed, path, header or {"format": "pt"})
        with pytest.raises(RecipeError, match=message):
            check_keys(path, config | {"args": config["args"] | args})

    one = torch.ones(16)
    block = "radio_model.model.blocks.0."
    refused("ls1.gamma is LayerScale", tensors | {f"{block}ls1.gamma": one})
    refused("LayerScale, which", tensors | {f"{block}layer_scale1.lambda1": one})
    refused("vLLM ignore in silence", tensors | {"radio_model.model.norm.weight": one})
    refused("vLLM ignore in silence", tensors | {"encoder.layer.0.norm1.bias": one})
    refused(r"bias has shape \(16,\), and by", tensors | {f"{block}attn.qkv.bias": one})
    gone = {k: v for k, v in tensors.items() if "norm1" not in k}
    refused("blocks.0.norm1.weight is missing, and 3 more", gone)
    refused("its header has format None", tensors, {"x": "y"})
    refused("8 registers by args, 4 by num_registers", tensors, register_multiple=8 + 3)
    refused("28 pixels of the table by args", tensors, cpe_max_size=28)


def test_heads_of_a_folder_that_transformers_saved_again_still_fit(
    student: Student, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.layer_scale1.lambda1.mul_(2)
    out = tmp_path / "tuned"
    model.save_pretrained(out)
    shutil.copy(folder / "heads.safetensors", out)
    tuned = ours.load(out)
    images = torch.rand(1, 3, 8, 20)
    with torch.no_grad():
        due = model(images).features
        came = tuned(images).backbone.spatial.flatten(2).transpose(1, 2)
    torch.testing.assert_close(came, due, atol=1e-5, rtol=0)
    model.save_pretrained(out, save_original_format=False)
    with pytest.raises(ours.errors.StudentError, match="without save_original_format=False"):
        ours.load(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(ours.errors.StudentError, match="the trunk of heads.safetensors, cannot"):
        ours.load(out)


def test_a_student_in_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    student = moved().to(torch.bfloat16)
    write_run(tmp_path, student)
    export_student(tmp_path, tmp_path / "hf", format="hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    assert ours.load(tmp_path / "hf").trunk.embedding.positions.dtype == torch.bfloat16


def test_the_size_is_the_largest_that_it_trained_at() -> None:
    recipe = dump_yaml({"run": {"resolution": 16}, "arms": {"a": {"resolution": [16, 20]}}})
    file = for_hf(file_of(moved(), recipe=recipe))
    assert best_size(file) == (16, 20)
    assert best_size(file_of(moved())) == (24, 24)
    large = file_of(moved(max_resolution=2044, patch_size=14))
    assert best_size(large) == (504, 504)  # not that of a table of 2044 px
    assert preprocessor_config((16, 20))["size"] == {"height": 16, "width": 20}
    assert hf_config(file, (16, 20))["image_size"] == 20


def test_no_place_of_the_machine_is_in_the_files() -> None:
    recipe = dump_yaml({"run": {"dir": "/home/me/runs/x", "resolution": 16}, "seed": 3})
    licences = json.dumps({"clip": "Apache-2.0; assuming that /home/me/s.pt holds the weights"})
    metadata = for_hf(file_of(moved(), recipe=recipe, licences=licences, step="7")).metadata
    assert "/home" not in str(metadata)
    assert parse_yaml(metadata["recipe"], "it") == {
        "run": {"dir": "x", "resolution": 16},
        "seed": 3,
    }
    assert "assuming that s.pt holds" in json.loads(metadata["licences"])["clip"]
    assert metadata["step"] == "7"


def test_a_student_without_any_summary_has_none_there(tmp_path: Path) -> None:
    write_run(tmp_path, moved({"muted": TARGETS["muted"]}, head=HeadConfig(hidden_dim=8)))
    export_student(tmp_path, tmp_path / "hf", format="hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["summary_idxs"] == []


def test_a_folder_is_a_student_wherever_one_is_asked_for(
    student: Student, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_student(folder, tmp_path / "one.safetensors", heads=("clip",))
    due = outputs(ours.load(folder))
    kept = outputs(ours.load(tmp_path / "one.safetensors"))
    assert {k.split("/")[0] for k in kept} == {"backbone", "clip"}
    assert all(torch.equal(value, due[name]) for name, value in kept.items())
    export_student(folder, tmp_path / "again", format="hf")
    assert {k: v.tolist() for k, v in outputs(ours.load(tmp_path / "again")).items()} == {
        k: v.tolist() for k, v in due.items()
    }
    register_kinds()
    entry = {"kind": "student", "path": str(folder), "head": "clip"}
    features = build_teacher(parse_teacher(entry))(IMAGES)
    assert torch.equal(features.spatial, due["clip/spatial"])
    assert "of its teachers: not in its file" in parse_teacher(entry).licence()
    assert parse_model({"kind": "student", "path": str(folder)}).path == folder
    for path in (folder, tmp_path / "one.safetensors"):
        untrained = {"kind": "student", "path": str(path), "untrained": True}
        with pytest.raises(RecipeError, match="untrained: needs the folder of a run, got an exp"):
            build_teacher(parse_teacher(untrained))
    sweep = ResolutionSweep(ResolutionSweepConfig(images=tmp_path, resolutions=[32, 64]))
    with pytest.raises(TeacherError, match="resolution_sweep: compares a student with"):
        sweep.check(build_teacher(parse_teacher(entry)))
    init = {"kind": "student", "path": folder}
    config = StudentConfig.model_validate(ours.load(folder).config.model_dump() | {"init": init})
    started = build_from(config, ORDERED)
    assert all(torch.equal(v, due[k]) for k, v in outputs(started.eval()).items())
