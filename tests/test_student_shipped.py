"""Students in the box: a name stands wherever the path of a student's file does."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import student as package
from distill import export, push
from distill.evaluation.kinds import register_evaluation_kinds
from distill.evaluation.models import model_of, parse_model
from distill.formats import hf
from distill.formats.export import export_student
from distill.formats.hub_metadata import read_front_matter
from distill.formats.publish import find_upload
from distill.formats.source import read_source
from distill.runtime.errors import RecipeError
from student import shipped
from student.errors import StudentError
from student.storage import load_student, read_header, read_student, save_student, student_of
from teachers.build import build_teacher, parse_teacher
from teachers.files import halved
from tests.quality.pack_student import LOG, RECIPE, pack
from tests.tiny_export import IMAGES, TARGETS, build, outputs, statistics, write_run
from tests.tiny_run import REPOSITORY

HEADS = ("siglip", "clip")  # the third was never trained
REAL = shipped.SHIPPED


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    student = build({name: TARGETS[name] for name in HEADS}, final_norm=False)
    write_run(folder, student)
    (folder / LOG).write_text('{"step": 7, "loss": 0.5}\n')
    return folder


@pytest.fixture
def box(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A box with one student, `tiny_box`, in place of the real one."""
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "box")
    pack(run, "tiny_box", tmp_path / "box")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "box"


def test_a_name_loads_what_the_run_trained(run: Path, box: Path) -> None:
    assert package.names() == ["tiny_box"]
    loaded = package.load("tiny_box")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    trained = outputs(load_student(run / "checkpoints/step-00000007"))
    actual = outputs(loaded)
    assert actual.keys() == trained.keys()
    for name, value in trained.items():
        head, part = name.split("/")
        if head in HEADS and part == "spatial":  # in its teacher's own space
            value = statistics(head).inverse(value)
        assert (actual[name] - value).norm() < 2e-3 * value.norm(), name


def test_the_box_holds_matrices_of_half_the_size(box: Path) -> None:
    with safe_open(box / "tiny_box" / shipped.WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in tensors.values() if t.ndim > 1} == {torch.float16}
    assert {t.dtype for t in tensors.values() if t.ndim < 2} == {torch.float32}


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_vectors_in_float32_keep_offsets_that_half_precision_would_round(
    scale: float, tmp_path: Path
) -> None:
    """Teachers have channels with large means, which a folded head has as its bias."""
    student = build()
    with torch.no_grad():
        for name, each in student.named_parameters():
            if name.endswith("final.2.bias"):
                each.copy_(scale * torch.linspace(0.9, 1.1, len(each)))
    exact = outputs(student)["clip/spatial"]
    parts = (student.config, student.targets, student.state_dict(), {})
    save_student(tmp_path / "half", *parts, half=True)
    halves = outputs(load_student(tmp_path / "half"))["clip/spatial"]
    for each in student.parameters():
        each.data = each.half().float()
    rounded = outputs(student)["clip/spatial"]
    spread = exact.std((0, 2, 3), keepdim=True).norm()  # what a picture or a probe sees
    assert (halves - exact).norm() / exact[0, 0].numel() ** 0.5 < 2e-3 * spread
    if scale > 1:
        assert (rounded - exact).norm() > 5 * (halves - exact).norm()


def test_a_value_beyond_float16_is_refused_by_its_name(tmp_path: Path) -> None:
    student = build()
    student.state_dict()["heads.clip.spatial.fc1.weight"][0, 0] = 7e4
    parts = (student.config, student.targets, student.state_dict(), {})
    with pytest.raises(StudentError, match=r"heads.clip.spatial.fc1.weight holds .*7e\+04.*65504"):
        save_student(tmp_path / "s", *parts, half=True)
    counts = halved({"n": torch.tensor(3)}, lambda *_: False, "x", StudentError)
    assert counts["n"].dtype == torch.int64


def test_half_is_for_files_of_our_own_format(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--half: is for --format safetensors, not onnx; --prec"):
        export_student(run, tmp_path / "s.onnx", format="onnx", half=True)


def test_an_unknown_name_is_told_the_closest_and_what_else_a_path_may_be(box: Path) -> None:
    told = r"no student of this name ships \(did you mean 'tiny_box'\?\); tiny_box ships; .*hf://"
    with pytest.raises(StudentError, match=f"student tiny_bux: .*{told}"):
        package.load("tiny_bux")
    with pytest.raises(StudentError, match=told):
        read_source(Path("tiny_bux"))
    with pytest.raises(StudentError, match=told):
        build_teacher(parse_teacher({"kind": "student", "path": "tiny_bux"}))
    with pytest.raises(RecipeError, match=r"did you mean 'tiny_box'"):
        model_of("tiny_bux")
    with pytest.raises(RecipeError, match=r"did you mean 'tiny_box'"):
        find_upload(Path("tiny_bux"))
    with pytest.raises(StudentError, match=r"x/tiny_bux: there is no such file$"):
        package.load("x/tiny_bux")


def test_what_lies_at_the_path_is_taken_and_said(
    box: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = build(layer_scale=0.1)
    save_student("tiny_box", other.config, other.targets, other.state_dict(), {})
    assert package.load("tiny_box").config == other.config
    assert "student tiny_box: took the path of [the path, the student that ships]" in caplog.text
    assert read_source(Path("tiny_box")).file.config == other.config


@pytest.mark.parametrize("head", [None, "clip"])
def test_a_name_is_a_teacher_and_a_model_of_a_suite(box: Path, head: str | None) -> None:
    register_evaluation_kinds()
    config = parse_model({**model_of("tiny_box"), "head": head})
    expected = package.load("tiny_box")(IMAGES)
    features = expected.heads[head] if head else expected.backbone
    assert torch.equal(build_teacher(config)(IMAGES).spatial, features.spatial)
    assert config.licence().startswith("Apache-2.0")
    with pytest.raises(RecipeError, match="needs the folder of a run, got an export, tiny_box"):
        build_teacher(parse_model({"kind": "student", "path": "tiny_box", "untrained": True}))


@pytest.mark.parametrize("format, suffix", [("safetensors", ""), ("radio", ".pth")])
def test_a_name_is_exported(
    box: Path, tmp_path: Path, format: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In RADIO's format too, whose heads are in their teachers' own spaces."""
    out = tmp_path / f"out{suffix}"
    monkeypatch.setattr(sys, "argv", ["export", "tiny_box", str(out), "--format", format])
    export.main()
    again = outputs(student_of(*read_source(out).file[:3], "again"))
    for name, value in outputs(package.load("tiny_box")).items():
        assert torch.equal(again[name], value)


def test_a_name_is_pushed(
    box: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["push", "tiny_box", "me/tiny", "--dry-run"])
    push.main()
    told = capsys.readouterr().out
    assert "student.safetensors: " in told
    assert "README.md: " in told
    (box / "tiny_box" / hf.CARD).unlink()
    with pytest.raises(RecipeError, match=r"tiny_box: is no whole student .*no README.md"):
        find_upload(Path("tiny_box"))


def test_a_packed_students_folder_is_whole(box: Path) -> None:
    check_folder(box / "tiny_box")


def test_every_student_that_ships_is_whole() -> None:
    for name in shipped.names():
        check_folder(REAL / name)
        header = read_header(name)
        licences = json.loads(header.metadata["licences"])
        card = (REAL / name / hf.CARD).read_text(encoding="utf-8")
        for teacher in header.targets:
            assert licences[teacher] in card, (name, teacher)


def check_folder(folder: Path) -> None:
    """What the docs promise of a student in the box."""
    file = read_student(folder / shipped.WEIGHTS)
    assert file.metadata["head_space"] == "teacher"
    student = load_student(folder / shipped.WEIGHTS)
    side = 2 * student.config.patch_size
    for name, value in outputs(student, torch.rand(1, 3, side, side)).items():
        assert value.isfinite().all(), name
    assert list(student.heads) == [n for n in file.targets if file.config.head.has(n)] != []
    card = (folder / hf.CARD).read_text(encoding="utf-8")
    assert read_front_matter(folder / hf.CARD)["license"]
    assert f"student.load('{folder.name}')" in card
    assert (folder / RECIPE).is_file()
    assert "/" + "home" not in (folder / RECIPE).read_text()
    assert all("step" in json.loads(line) for line in (folder / LOG).read_text().splitlines())


@pytest.mark.parametrize("name", ["student.small", "teachers.small"])
def test_wheels_have_every_file_of_the_boxes(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"][name]
    folder = REPOSITORY / name.replace(".", "/")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    files = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert files <= found
