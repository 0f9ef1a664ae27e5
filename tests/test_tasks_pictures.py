"""`distill.visualize` of upsamplers: what its columns are, and the biases side by side."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill import visualize
from distill.display.columns import HEIGHT, Column, layout
from distill.runtime.checkpoint import save_checkpoint
from distill.runtime.config import dump_yaml
from distill.tasks import pictures
from distill.tasks.pictures import draw_biases, find_upsampler, stages
from teachers.build import build_teacher, parse_teacher
from teachers.fingerprint import teacher_fingerprint
from teachers.phi_s import FeatureStatistics, fit_phi_s
from teachers.teacher import Teacher
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.featsharp import FeatSharp
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.resize import enlarge, resize
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.tile import encode_tiles
from teachers.upsamplers.trained import UpsamplerCard, load_upsampler, save_upsampler
from tests.tiny_run import write_images

ENTRY = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 48]}
FEATSHARP = {"kind": "featsharp", "inputs": ["jbu", "tiles"], "factor": [2, 2]}


def _teacher() -> Teacher:
    return build_teacher(parse_teacher(ENTRY))


def _save(path: Path, *, seed: int = 0, bias: bool = True, entry: dict = FEATSHARP) -> Path:
    """An upsampler with random weights, none of them at its initial value."""
    torch.manual_seed(seed)
    teacher, config = _teacher(), parse_upsampler(entry)
    dim = teacher.spec.spatial_dim
    sums = FeatureStatistics.zeros(dim)
    sums.update(3 * torch.randn(2 * dim, dim) + 1)
    assert config is not None
    inner = build_upsampler(config, teacher.spec)
    upsampler = Standardised(inner, fit_phi_s(sums), bias=bias)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    card = UpsamplerCard(
        upsampler=entry,
        bias=bias,
        spec=teacher.spec,
        teacher=ENTRY,
        fingerprint=teacher_fingerprint(teacher),
    )
    save_upsampler(path, upsampler.state_dict(), card)
    return path


def _stages(path: Path, teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return stages(load_upsampler(path), teacher, images)


def test_the_columns_are_the_encoders_maps_and_each_step_to_the_upsampled(tmp_path: Path) -> None:
    path, teacher = _save(tmp_path / "up.safetensors"), _teacher()
    images = torch.rand(2, 3, 64, 96)
    came = _stages(path, teacher, images)
    assert list(came) == ["raw", "raw, 64 x 96 px", "bilinear", "jbu", "featsharp"]
    upsampler = load_upsampler(path)
    assert isinstance(upsampler.inner, FeatSharp)
    assert upsampler.bias is not None
    raw = teacher(resize(images, (32, 48))).spatial
    clean = upsampler.phi_s(raw) + upsampler.bias.map
    with torch.no_grad():
        sharp = upsampler.inner.jbu(clean, guidance(images, (4, 6)))
    expected = {
        "raw": raw,
        "raw, 64 x 96 px": teacher(images).spatial,
        "bilinear": enlarge(upsampler.phi_s.inverse(clean), (2, 2)),
        "jbu": upsampler.phi_s.inverse(sharp),
        "featsharp": upsampler(images, teacher).high.spatial,
    }
    for title, maps in expected.items():
        torch.testing.assert_close(came[title], maps, rtol=1e-4, atol=1e-4, msg=title)
    assert not torch.allclose(came["jbu"], came["featsharp"], atol=1e-2)


def test_the_tiles_stand_for_an_encoder_that_takes_no_larger_images(tmp_path: Path) -> None:
    path, teacher = _save(tmp_path / "up.safetensors"), _teacher()
    fixed = replace(teacher.spec, any_resolution=False)
    teacher.spec = fixed
    upsampler = load_upsampler(path)
    upsampler.spec = upsampler.inner.spec = fixed
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        came = stages(upsampler, teacher, images)
    assert list(came) == ["raw", "tiles", "bilinear", "jbu", "featsharp"]
    assert torch.equal(came["tiles"], encode_tiles(images, teacher, fixed, (2, 2))[1])


@pytest.mark.parametrize(
    "entry, last",
    [
        ({"kind": "tile", "factor": [1, 2]}, ["tile"]),
        (FEATSHARP | {"inputs": ["bilinear", "tiles"]}, ["featsharp"]),
        (FEATSHARP | {"inputs": ["tiles"]}, ["tiles", "featsharp"]),
    ],
)
def test_only_a_residual_path_of_its_own_has_a_column(
    entry: dict, last: list[str], tmp_path: Path
) -> None:
    path, teacher = _save(tmp_path / "up.safetensors", entry=entry), _teacher()
    factor = load_upsampler(path).factor
    came = _stages(path, teacher, torch.rand(1, 3, 32 * factor[0], 48 * factor[1]))
    assert list(came)[2:] == ["bilinear", *last]


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        visualize.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_one_command_draws_a_row_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 2)
    path, out = _save(tmp_path / "up.safetensors"), tmp_path / "figure.png"
    assert _call(monkeypatch, path, tmp_path / "images", "--out", out) == 0
    width = HEIGHT * 96 // 64
    assert width == 288
    with Image.open(out) as picture:
        assert picture.size == layout([Column("", torch.zeros(2, 3, 64, 96))] * 6).size


def test_biases_stand_side_by_side_each_in_its_own_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_save(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    out = tmp_path / "bias.png"
    assert _call(monkeypatch, "--bias", *files, files[0], "--out", out) == 0
    with Image.open(out) as picture:
        pixels = np.asarray(picture)[22:]
    width = HEIGHT * 3 // 2
    first, other, same = (pixels[:, x : x + width] for x in range(0, 3 * (width + 6), width + 6))
    assert len(np.unique(first.reshape(-1, 3), axis=0)) == 2 * 3  # a colour for each cell
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_bias_is_as_strong_as_what_differs_between_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _save(tmp_path / "up.safetensors")
    upsampler = load_upsampler(path)
    assert upsampler.bias is not None
    upsampler.bias.map[:] = 7.0  # seen by no consistency
    upsampler.bias.map[:, 0] += 0.5
    titles: list[str] = []
    monkeypatch.setattr(pictures, "load_upsampler", lambda _: upsampler)
    monkeypatch.setattr(
        pictures, "draw_side_by_side", lambda _, maps: titles.extend(t for t, _ in maps)
    )
    draw_biases(tmp_path / "out.png", [path])
    assert titles == ["test_vit, rms 0.25"]


def test_mistakes_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _save(tmp_path / "up.safetensors", bias=False)
    (tmp_path / "recipe.yaml").write_text("task: upsampler\n")
    for arguments, message in (
        ([path], "give images, or folders"),
        ([path, tmp_path, "--resolution", 64], "--resolution: is for students"),
        ([path, "--bias"], "learned no position bias; train with `bias: true`"),
        ([path, tmp_path, "--out", "x.gif"], "--out x.gif: expected a .png file"),
        ([tmp_path / "gone.safetensors", tmp_path], "there is no such file"),
        ([tmp_path / "recipe.yaml", tmp_path], "recipe.yaml"),
    ):
        assert _call(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err


def test_another_encoder_than_the_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 1)
    path = _save(tmp_path / "up.safetensors")
    monkeypatch.setattr(pictures, "teacher_fingerprint", lambda _: "0" * 64)
    assert _call(monkeypatch, path, tmp_path / "images", "--out", tmp_path / "x.png") == 2
    assert "trained for an encoder of the same shape with other weights" in capsys.readouterr().err


def test_a_file_and_the_name_of_a_shipped_one_stand_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip_featsharp.safetensors").touch()
    monkeypatch.setattr(pictures, "SHIPPED", tmp_path)
    for target in (Path("clip_featsharp"), Path("anywhere/up.safetensors")):
        assert find_upsampler(target) == target


def test_a_recipe_a_run_and_a_checkpoint_stand_for_the_newest_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = {
        "task": "upsampler",
        "run": {"dir": str(run), "steps": 200, "batch_size": 1},
        "data": {"sources": [{"shards": "absent"}]},
        "teacher": ENTRY,
        "upsampler": FEATSHARP,
    }

    def write(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(dump_yaml(tree))
        _save(folder / "upsampler.safetensors")

    for step in (1, 2):
        save_checkpoint(run / "checkpoints", step, write, {}, keep=2)
    for recipe in (run / "recipe.yaml", tmp_path / "recipe.yaml"):
        recipe.write_text(dump_yaml(tree))
    first, newest = (run / f"checkpoints/step-0000000{step}" for step in (1, 2))
    for target, found in (
        (tmp_path / "recipe.yaml", newest),
        (run, newest),
        (newest, newest),
        (first, first),
    ):
        assert find_upsampler(target) == found / "upsampler.safetensors"
