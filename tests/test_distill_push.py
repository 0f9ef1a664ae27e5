"""Uploads to, and students from, a local stand-in for the hub, by its real client."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest
import torch
from huggingface_hub import ModelCard, constants

import student as ours
from distill.evaluation.models import model_of
from distill.formats.export import export_student
from distill.formats.source import read_source
from distill.push import main
from distill.runtime.config import dump_yaml
from distill.tasks.kinds import register_kinds
from student.config import StudentConfig
from student.errors import StudentError
from student.initial import build as build_from
from student.storage import save_student, student_file
from teachers.build import build_teacher, parse_teacher
from tests.hub_double import READ_ONLY, Hub, Repo, served
from tests.tiny_export import IMAGES, TARGETS, build, outputs, write_run

pytestmark = pytest.mark.long  # importing transformers and its check of an export take seconds


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each kind: hf, s.safetensors, s.pth."""
    folder = tmp_path_factory.mktemp("exports")
    write_run(folder / "run", build(final_norm=False))
    for name, format in (("hf", "hf"), ("s.safetensors", "safetensors"), ("s.pth", "radio")):
        export_student(folder / "run", folder / name, format=format, heads=("clip",))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with served(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def push(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["push", *map(str, arguments)])
    main()


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
    code: int = 2,
) -> str:
    with pytest.raises(SystemExit) as ended:
        push(monkeypatch, *arguments)
    assert ended.value.code == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_a_folder_goes_up_in_one_commit_and_comes_back_whole(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push(monkeypatch, exports / "hf", "me/vit")
    told = capsys.readouterr().out
    files = {each.name: each.read_bytes() for each in (exports / "hf").iterdir()}
    assert files == {
        k: v for k, v in hub.repos["me/vit"].commits.popitem()[1].items() if k in files
    }
    assert len([each for each in hub.asked if "/commit/" in each]) == 1
    assert set(hub.lfs.values()) == {files["model.safetensors"], files["heads.safetensors"]}
    assert not hub.repos["me/vit"].private
    for name in files:
        assert f"{name}: {len(files[name]) / 1e3:.1f} kB\n" in told
    assert f" kB to me/vit, licence other: {hub.url}/me/vit/commit/" in told


def test_students_come_from_the_hub(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(monkeypatch, exports / "hf", "me/vit")
    push(monkeypatch, exports / "s.safetensors", "hf://me/plain", "--private")
    due = outputs(ours.load(exports / "hf"))
    for place in ("hf://me/vit", "hf://me/plain", "hf://me/plain/s.safetensors"):
        came = outputs(ours.load(place))
        assert came.keys() == due.keys()
        assert all(torch.equal(value, due[name]) for name, value in came.items()), place
    # As pydantic's paths write it: what recipes name, and what commands take.
    assert student_file(Path("hf://me/vit")) == student_file("hf://me/vit")
    assert read_source(Path("hf://me/vit")).file.targets == ours.load("hf://me/vit").targets
    register_kinds()
    entry = parse_teacher(model_of("hf://me/vit") | {"head": "clip"})
    assert torch.equal(build_teacher(entry)(IMAGES).spatial, due["clip/spatial"])
    assert "of its teachers" in entry.licence()
    config = ours.load("hf://me/plain").config.model_dump()
    init = {"kind": "student", "path": "hf://me/vit"}
    started = build_from(StudentConfig.model_validate(config | {"init": init}), TARGETS)
    assert torch.equal(outputs(started.eval())["clip/spatial"], due["clip/spatial"])
    before = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for place in ("hf://me/vit", "hf://me/plain"):
        assert outputs(ours.load(place)).keys() == due.keys()
    with pytest.raises(StudentError, match="hf://me/other: HF_HUB_OFFLINE is set, and it is not"):
        ours.load("hf://me/other")
    assert len(hub.asked) == before


def test_a_branch_is_another_revision(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(monkeypatch, exports / "s.safetensors", "me/vit", "--revision", "next")
    repo = hub.repos["me/vit"]
    assert "s.safetensors" not in repo.commits[repo.refs["main"]]
    assert list(ours.load("hf://me/vit@next").heads) == ["clip"]
    assert list(ours.load(f"hf://me/vit@{repo.refs['next']}").heads) == ["clip"]
    with pytest.raises(StudentError, match="vit@nxt: the repository has no such revision"):
        ours.load("hf://me/vit@nxt")
    with pytest.raises(StudentError, match="expected one safetensors file.*it has none"):
        ours.load("hf://me/vit")


def test_the_card_beside_a_file_becomes_that_of_the_repository(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("s.safetensors", "s.pth"):
        push(monkeypatch, exports / name, f"me/{name}")
        repo = hub.repos[f"me/{name}"]
        files = repo.commits[repo.refs["main"]]
        assert set(files) == {".gitattributes", name, "README.md"}
        assert files["README.md"] == (exports / f"{name}.md").read_bytes()
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "other"
        assert "featsharp-distill" in card.data.tags


def test_a_dry_run_asks_nobody(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    push(monkeypatch, exports / "hf", "me/vit", "--dry-run", "--revision", "next")
    assert " kB to me/vit, branch next, licence other\n" in capsys.readouterr().out
    assert not hub.asked


def test_paths_of_the_machine_in_a_header_are_told(
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = dump_yaml({"run": {"dir": "/home/me/runs/x"}})
    student = ours.load(exports / "s.safetensors")
    arguments = student.config, student.targets, student.state_dict(), {"recipe": recipe}
    save_student(tmp_path / "s.safetensors", *arguments)
    (tmp_path / "s.safetensors.md").write_bytes((exports / "s.safetensors.md").read_bytes())
    push(monkeypatch, tmp_path / "s.safetensors", "me/vit", "--dry-run")
    assert "note: the recipe in its header has absolute paths" in capsys.readouterr().out
    push(monkeypatch, exports / "s.safetensors", "me/vit", "--dry-run")
    assert "note" not in capsys.readouterr().out


def test_what_is_no_export_is_refused(
    exports: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(path: Path) -> str:
        return refused(monkeypatch, capsys, path, "me/vit")

    run = exports / "run"
    assert "is a run or a checkpoint; export it first, `python -m distill.export" in told(run)
    assert "is a run or a checkpoint" in told(run / "checkpoints/step-00000007")
    assert "is no folder of `distill.export --format hf`: there is no config" in told(tmp_path)
    assert "there is no nowhere" in told(tmp_path / "nowhere")
    (tmp_path / "mine.bin").write_bytes(b"x")
    assert "is no export with its card beside it: there is no mine.bin.md" in told(
        tmp_path / "mine.bin"
    )
    (tmp_path / "mine.bin.md").write_text("---\nlicense: mit\n---\nmine")
    assert "its tags have no featsharp-distill" in told(tmp_path / "mine.bin")
    (tmp_path / "mine.bin.md").write_text("mine")
    assert "does not begin with metadata" in told(tmp_path / "mine.bin")
    assert not hub.asked


def test_a_broken_folder_is_refused(
    exports: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copytree(exports / "hf", tmp_path / "hf")
    config = folder / "config.json"
    content = json.loads(config.read_text())
    for changes, message in (
        ({"num_registers": 5}, "4 registers by args, 5 by num_registers"),
        ({"hidden_size": 32}, "and by its config.json (32,)"),
        ({"args": []}, "config.json: a field is not what an export writes"),
    ):
        config.write_text(json.dumps(content | changes))
        assert message in refused(monkeypatch, capsys, folder, "me/vit")
    config.write_text('{"model_type": "radio"}')
    assert "config.json: args is missing" in refused(monkeypatch, capsys, folder, "me/vit")
    assert not hub.asked


def test_every_trouble_of_an_upload_is_one_message(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(repo: str = "me/vit", *more: str, code: int = 2) -> str:
        return refused(monkeypatch, capsys, exports / "s.pth", repo, *more, code=code)

    assert "is no name on the hub" in told("me/too/deep")
    hub.repos["me/open"] = Repo(private=False)
    hub.repos["me/open"].commit("main", {})
    assert "exists and is public, and --private was asked for" in told("me/open", "--private")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "refuses the token (code 403)" in told()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses the token (code 401)" in told()
    hub.fails = 500
    assert "answered with code 500" in told(code=1)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in told(code=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set\n" in told(code=1)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token of the hub; log in with `hf auth login`" in told()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'featsharp-distill[hf]'" in told()


def test_a_card_that_the_hub_refuses_is_told(
    exports: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "s.pth").write_bytes((exports / "s.pth").read_bytes())
    card = (exports / "s.pth.md").read_text().replace("license: other", "license: nonsense")
    (tmp_path / "s.pth.md").write_text(card)
    told = refused(monkeypatch, capsys, tmp_path / "s.pth", "me/vit")
    assert "no commit was made: Invalid metadata in README.md" in told


def test_every_trouble_of_a_download_is_one_message(
    exports: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (exports / "s.safetensors").read_bytes()
    hub.add("me/two", {"a.safetensors": weights, "b.safetensors": weights})
    hub.add("me/llm", {"config.json": b"{}", "model-00001-of-00009.safetensors": b""})
    hub.add("me/radio", {"config.json": b"{}", "model.safetensors": weights})
    hub.add("me/junk", {"x.safetensors": b"junk"})
    hub.repos["me/secret"] = Repo(private=True)

    def told(place: str) -> str:
        with pytest.raises(StudentError) as error:
            ours.load(place)
        return str(error.value)

    assert "there are a.safetensors, b.safetensors; name one: hf://me/two/a.saf" in told(
        "hf://me/two"
    )
    assert list(ours.load("hf://me/two/b.safetensors").heads) == ["clip"]
    assert "(did you mean 'b.safetensors'?)" in told("hf://me/two/bb.safetensors")
    for repo in ("me/llm", "me/radio"):
        assert "a model of another library, not a student" in told(f"hf://{repo}")
    assert not [
        each
        for each in hub.asked
        if "00001-of" in each or ("me/radio/resolve" in each and "model.saf" in each)
    ]
    assert "not a valid student file" in told("hf://me/junk")
    assert "has no such repository, or it is private" in told("hf://me/nothing")
    assert "expected hf://OWNER/NAME" in told("hf://vit")
    monkeypatch.delenv("HF_TOKEN")
    assert "has no such repository, or it is private" in told("hf://me/secret")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs huggingface_hub" in told("hf://me/two")
