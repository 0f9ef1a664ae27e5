"""The page "use the student": its commands and its code, run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from distill import push
from distill.export import main
from distill.formats.publish import find_upload
from distill.runtime.config import parse_yaml
from student.config import HeadConfig, StudentConfig
from student.model import Student
from student.storage import load_student, save_student
from student.timm_config import TimmStudentConfig
from teachers.build import parse_teacher
from tests.tiny_export import TARGETS, build, write_run
from tests.tiny_run import DEADLOCK_S, REPOSITORY, environment

pytestmark = pytest.mark.process  # of one test, but for all the page's exports take long

HEAD = HeadConfig(hidden_dim=12, num_layers=1)
TEXT = (REPOSITORY / "student" / "README.md").read_text()
# What a user without the trainer does not have.
WITHOUT = (
    "import sys\nsys.modules |= dict.fromkeys(['deepspeed', 'distill', 'ruamel', 'open_clip'])\n"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def lines(word: str) -> list[str]:
    """The page's commands with a word."""
    return [line for text in blocks("bash") for line in text.splitlines() if word in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's commands leave where a run of the quickstart's name lies."""
    folder = tmp_path_factory.mktemp("page")
    targets = {name: TARGETS[name] for name in ("clip", "siglip")}
    student = build(targets=targets, patch_size=16, max_resolution=512, depth=6)
    write_run(folder / "runs/quickstart", student)
    cnn = Student(TimmStudentConfig(model="convnext_atto", head=HEAD), targets).eval()
    save_student(folder / "convnext.safetensors", cnn.config, cnn.targets, cnn.state_dict(), {})
    commands = lines("distill.export")
    assert len(commands) == 11
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            python, _, module, *arguments = shlex.split(command, comments=True)
            assert (python, module) == ("python", "distill.export")
            patch.setattr(sys, "argv", ["export", *arguments])
            main()
    return folder


def test_the_commands_leave_every_file_and_its_card(folder: Path) -> None:
    names = ["student.safetensors", "student.onnx", "student.pt2", "student.pth.tar"]
    names += ["backbone.safetensors", "clip.safetensors", "start.safetensors"]
    names += ["student_fp16.onnx", "student_int8.onnx", "student_17.onnx"]
    for name in names:
        assert (folder / name).is_file()
        assert (folder / f"{name}.md").is_file()
    for name in ("config.json", "model.safetensors", "heads.safetensors", "README.md"):
        assert (folder / "student_hf" / name).is_file()


def test_the_commands_of_the_hub_are_valid(folder: Path) -> None:
    paths = []
    for command in lines("distill.push"):
        *_, module, path, repo = [w for w in shlex.split(command, comments=True) if w[0] != "-"]
        assert module == "distill.push"
        assert push.parse_arguments(shlex.split(command, comments=True)[3:]).repo == repo
        found = find_upload(folder / path)
        assert found.files
        paths.append(path)
    assert paths == ["student_hf", "student_hf", "student.safetensors"]


def test_the_code_runs_without_the_trainer(folder: Path) -> None:
    script = WITHOUT + "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLOCK_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 32])\ntorch.Size([2, 16, 16, 24])" in done.stdout
    assert "clip torch.Size([2, 9]) torch.Size([2, 8, 32, 48])" in done.stdout  # twice as dense
    assert str([(1, 16, 16, 24)] * 3) in done.stdout
    assert "(1, 16, 16, 16)\n(4, 16, 10, 20)\nint8 20 16 " in done.stdout
    assert "torch.Size([2, 32]) torch.Size([28, 16])" in done.stdout  # packed: 4 x 6 and 2 x 2
    assert "['clip', 'siglip']\nNaFlexVit\n" in done.stdout
    assert "(1, 40, 64, 96), (1, 80, 32, 48), (1, 160, 16, 24), (1, 320, 8, 12)" in done.stdout
    assert "torch.Size([1, 8, 16, 24])\n" in done.stdout  # of the CNN's head
    assert "torch.Size([1, 384, 16]) 16" in done.stdout
    probe, lora, full = map(int, re.findall(r"(\d+) parameters train", done.stdout))
    assert probe == 5 * 16 + 5
    # Six blocks; qkv, proj, fc1 and fc2 of 16 channels, at rank 8.
    assert lora - probe == 6 * 8 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    backbone = load_student(folder / "backbone.safetensors")
    assert full - probe == sum(p.numel() for p in backbone.parameters())


def test_low_rank_updates_become_a_file_again(folder: Path, tmp_path: Path) -> None:
    """The functions of the page's code, and its last words."""
    (code,) = [text for text in blocks("python") if "class LowRank" in text]
    page: dict[str, Any] = {}
    exec(code.partition("images, labels")[0], page)
    model = page["adapted"](folder / "backbone.safetensors", "lora")
    images = torch.rand(1, 3, 64, 96)
    before = load_student(folder / "backbone.safetensors")(images).backbone.spatial
    assert torch.equal(model(images).backbone.spatial, before)  # B is zero
    linears = [m for m in model.modules() if parametrize.is_parametrized(m)]
    for linear in linears:
        torch.nn.init.normal_(linear.parametrizations.weight[0].b, std=0.1)
    due = model(images).backbone.spatial
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight")
    save_student(tmp_path / "s", model.config, model.targets, model.state_dict(), {})
    came = load_student(tmp_path / "s")(images).backbone.spatial
    assert not torch.allclose(came, before, atol=1e-3)
    torch.testing.assert_close(came, due, atol=1e-6, rtol=1e-6)


def test_the_recipes_are_valid_and_fit_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    teachers, student = (parse_yaml(text, "the page") for text in blocks("yaml"))
    entry = teachers["teachers"]["own"]
    assert parse_teacher(entry | {"upsampler": None}).weights == "student.pth.tar"
    assert parse_teacher(teachers["teachers"]["v4"]).model == "c-radio_v4-h"
    config = StudentConfig.model_validate(student["student"])
    start = load_student("start.safetensors").config
    assert (config.max_resolution, config.shape.depth) == (start.max_resolution, start.shape.depth)
    assert config.final_norm == start.final_norm
