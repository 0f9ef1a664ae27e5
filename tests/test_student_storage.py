"""Students on disk: what is written is what comes back, without the trainer's packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import student as package
from student.config import HeadConfig, StudentConfig
from student.errors import StudentError
from student.model import Student
from student.storage import load_student, read_header, read_student, save_student
from teachers.features import FeatureSpec

TARGETS = {
    "siglip": FeatureSpec(summary_dim=5, spatial_dim=6, patch_size=14, resolution=(28, 42)),
    "clip": FeatureSpec(summary_dim=None, spatial_dim=7, patch_size=16, resolution=(32, 32)),
}


def build(**changes: object) -> Student:
    torch.manual_seed(0)
    head = HeadConfig(hidden_dim=12, num_layers=1)
    sizes = {"width": 16, "heads": 2, "depth": 1, "patch_size": 4, "max_resolution": 24}
    return Student(StudentConfig(**(sizes | {"head": head} | changes)), TARGETS).eval()


def save(student: Student, path: Path) -> None:
    save_student(
        path, student.config, student.targets, student.state_dict(), {"commit": "abc", "step": "7"}
    )


@pytest.mark.parametrize(
    "changes", [{"register_multiple": 8}, {"num_registers": 0, "layer_scale": 0.1}]
)
def test_a_loaded_student_is_the_saved_one_bitwise(tmp_path: Path, changes: dict) -> None:
    student, images = build(**changes), torch.rand(2, 3, 8, 20)
    save(student, tmp_path / "student.safetensors")
    loaded = package.load(tmp_path / "student.safetensors")
    assert not loaded.training
    assert loaded.config == student.config
    assert list(loaded.targets.items()) == list(TARGETS.items())
    assert all(p.requires_grad for p in loaded.parameters())
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    for name, (summary, spatial) in student(images).heads.items():
        assert torch.equal(loaded(images).heads[name].spatial, spatial)
        assert summary is None or torch.equal(loaded(images).heads[name].summary, summary)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("head", [{}, {"attention_blocks": 1, "attention_heads": 2}])
def test_a_file_that_is_older_than_a_key_loads_as_it_was_written(
    norm: bool, head: dict, tmp_path: Path
) -> None:
    """The first students had final norms, and all heads biases, that no key told."""
    bias = bool(head)
    config = HeadConfig(hidden_dim=12, num_layers=1, attention_bias=bias, **head)
    student, images = build(final_norm=norm, head=config), torch.rand(1, 3, 8, 20)
    save(student, tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        header = file.metadata()
    stated = json.loads(header["config"])
    assert stated.pop("final_norm") is norm
    assert stated["head"].pop("attention_bias") is bias
    save_file(student.state_dict(), tmp_path / "old", header | {"config": json.dumps(stated)})
    old = load_student(tmp_path / "old")
    assert old.config == read_header(tmp_path / "old").config == student.config
    for name, features in student(images).heads.items():
        assert torch.equal(old(images).heads[name].spatial, features.spatial)


def test_a_bfloat16_student_stays_one(tmp_path: Path) -> None:
    save(build().bfloat16(), tmp_path / "s")
    assert {p.dtype for p in load_student(tmp_path / "s").parameters()} == {torch.bfloat16}


def test_metadata_come_back_and_initial_weights_are_forgotten(tmp_path: Path) -> None:
    student = build()
    init = {"kind": "student", "path": tmp_path / "gone"}
    config = StudentConfig(**(student.config.model_dump() | {"init": init}))
    save_student(tmp_path / "s", config, TARGETS, student.state_dict(), {"commit": "abc"})
    file = read_student(tmp_path / "s")
    assert file.metadata == {"commit": "abc"}
    assert file.config == student.config
    assert read_header(tmp_path / "s") == (file.config, file.targets, file.metadata)


@pytest.mark.process
def test_a_student_loads_where_deepspeed_and_distill_cannot_be_imported(tmp_path: Path) -> None:
    """And the package alone imports no model library."""
    student = build()
    save(student, tmp_path / "s")
    images = torch.rand(1, 3, 8, 20)
    torch.save((images, student(images).heads["siglip"].summary), tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["deepspeed"] = sys.modules["distill"] = None
import student, torch
print({{"timm", "torchvision"}} & {{*sys.modules}})
images, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(student.load({str(tmp_path / "s")!r})(images).heads["siglip"].summary, expected)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(package.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (0, "set()\n"), ran.stderr


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(build(), tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def fail(state: dict, path: Path, header: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("teachers.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(build(layer_scale=0.1), tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert (tmp_path / "s").read_bytes() == before


def test_saving_with_an_unresolved_normalisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not resolved; pass Student.config"):
        save_student(tmp_path / "s", StudentConfig(), TARGETS, build().state_dict(), {})


def test_saving_the_weights_of_another_student_is_refused(tmp_path: Path) -> None:
    student = build(final_norm=True)
    state = student.state_dict()
    del state["trunk.norm.weight"]
    with pytest.raises(RuntimeError, match=r"1 weights do not fit.*norm.weight has.*None.*16"):
        save_student(tmp_path / "s", student.config, TARGETS, state, {})


def run_of(folder: Path, *steps: int, status: str | None) -> Path:
    for step in steps:
        checkpoint = folder / f"checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save(build(layer_scale=0.1 * step), checkpoint / "student.safetensors")
    if status is not None:
        (folder / "STATUS.json").write_text(json.dumps({"status": status}))
    return folder


def test_a_run_that_is_done_is_loaded_by_its_folder_or_that_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path, 1, 2, status="done")
    last = load_student(run / "checkpoints/step-00000002/student.safetensors").state_dict()
    for path in (run, run / "checkpoints/step-00000002"):
        for name, value in load_student(path).state_dict().items():
            assert torch.equal(value, last[name])


@pytest.mark.parametrize("status", ["running", "preempted", "failed", None])
def test_of_a_run_that_is_not_done_the_checkpoints_are_told_with_the_command(
    status: str | None, tmp_path: Path
) -> None:
    run = run_of(tmp_path, 1, 2, status=status)
    with pytest.raises(StudentError) as refused:
        load_student(run)
    text = str(refused.value)
    assert f"a run that is not done ({status or 'no STATUS.json'}); there are step-00000001" in text
    assert f"python -m distill.export {run / 'checkpoints/step-00000002'} student.saf" in text


def test_of_another_folder_it_is_told_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=r"is a folder, but neither .*; it holds no student"):
        load_student(tmp_path)
    save(build(), tmp_path / "mine.safetensors")
    with pytest.raises(StudentError, match=r"there are mine.safetensors; name one of them"):
        load_student(tmp_path)
    with pytest.raises(StudentError, match=r"no such file \(did you mean 'mine.safetensors'\?\)"):
        load_student(tmp_path / "mime.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="nowhere: there is no such file"):
        load_student(tmp_path / "nowhere")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"not a student")
    with pytest.raises(StudentError, match="not a valid student file"):
        load_student(tmp_path / "s")


def test_safetensors_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "s")
    with pytest.raises(StudentError, match="its format is None, expected 'featsharp"):
        load_student(tmp_path / "s")


def test_a_file_that_states_no_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save(build(), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    del config["mean"], config["std"]
    save_file(load_file(path), path, header | {"config": json.dumps(config)})
    with pytest.raises(StudentError, match="its config states no mean and std"):
        load_student(path)


def test_a_header_of_another_version_is_refused_by_the_key(tmp_path: Path) -> None:
    header = {"format": "featsharp-distill student 1", "config": '{"sise": 1}', "targets": "{}"}
    save_file({"x": torch.zeros(1)}, tmp_path / "s", header | {"metadata": "{}"})
    with pytest.raises(StudentError, match="not a valid student file.*[\n]*sise"):
        load_student(tmp_path / "s")


def test_a_file_whose_weights_are_not_its_students_is_refused(tmp_path: Path) -> None:
    student = build(final_norm=True)
    save(student, tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        header = file.metadata()
    state = student.state_dict() | {"trunk.norm.bias": torch.zeros(3)}
    save_file(state, tmp_path / "s", header)
    with pytest.raises(StudentError, match=r"trunk.norm.bias has shape \(3,\), expected \(16,\)"):
        load_student(tmp_path / "s")
