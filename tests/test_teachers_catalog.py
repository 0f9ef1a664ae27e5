"""Every encoder of the catalogue: its facts against the libraries, and its contract at toy size."""

from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import torch

from distill.runtime.config import load_yaml
from teachers import catalog
from teachers.build import TEACHERS, build_teacher, parse_teacher
from teachers.catalog import licence_of, main
from teachers.catalog_rows import OPEN_KINDS, PIXELS, ROWS, Row
from teachers.dry_run import dry_run
from teachers.licences import LICENCES
from teachers.radio_models import PUBLISHED, timm
from teachers.teacher import Teacher
from teachers.testing import check_teacher
from tests.small_teachers import architecture_of, small_teacher
from tests.tiny_run import REPOSITORY

# timm says Apache-2.0 of weights that it was told nothing about; their own cards say these.
OVERRULED = {"gemma", "mit"}

CHECKED: set[str] = set()  # networks that `check_teacher` has passed

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def build(row: Row) -> Teacher:
    """On the meta device, whose clamping of initial weights is Python and half of the time."""
    with mock.patch.object(torch.Tensor, "clamp_", lambda tensor, **_: tensor):
        return build_teacher(parse_teacher(row.entry), device="meta")


def own_normalization(row: Row) -> tuple[tuple[float, ...], ...]:
    """What the library itself says."""
    if row.kind == "timm":
        cfg = timm.get_pretrained_cfg(architecture_of(row))
        assert cfg is not None
        return tuple(cfg.mean), tuple(cfg.std)
    if row.kind == "radio":
        return PUBLISHED[row.model][0].mean, PUBLISHED[row.model][0].std
    tag = open_clip.get_pretrained_cfg(row.model, str(row.weights))
    return tuple(tag["mean"]), tuple(tag["std"])


@pytest.mark.long
@rows
def test_a_row_is_true_of_the_encoder_at_full_size(row: Row) -> None:
    teacher = build(row)
    assert teacher.spec == row.spec
    assert teacher.spec.spatial_from == row.place
    assert bool(teacher.spec.summary_from) == (row.summary is not None)
    assert teacher.normalization == PIXELS[row.pixels]
    if row.weights or row.kind not in ("dfn_clip", "siglip"):  # the small ones are nobody else's
        assert teacher.normalization == own_normalization(row)
    millions = sum(p.numel() for p in teacher.parameters()) / 1e6
    assert millions == pytest.approx(row.millions, abs=0.05)
    dry_run(teacher)


@pytest.mark.long
@rows
def test_a_row_says_which_other_sizes_there_are(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = 2 * row.patch, 3 * row.patch
    other = torch.rand(1, 3, height, width)
    native = small_teacher(row, tmp_path, monkeypatch)
    if row.sizes == "any":
        assert native(other).spatial.shape[2:] == (2, 3)
        return
    side, _ = native.spec.resolution
    with pytest.raises(ValueError, match=f"{side} x {side} px only"):
        native(other)
    asked = small_teacher(row, tmp_path, monkeypatch, resolution=[height, width])
    assert asked(other).spatial.shape[2:] == (2, 3)
    assert asked.spec.any_resolution == (row.sizes == "asked")


@pytest.mark.long
@rows
def test_a_row_keeps_the_contract_at_toy_size(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = row.patch
    oblong = {} if row.sizes == "any" else {"resolution": [2 * patch, 3 * patch]}
    teacher = small_teacher(row, tmp_path, monkeypatch, **oblong)
    assert teacher.normalization == PIXELS[row.pixels]
    network = repr((teacher, teacher.spec))  # the rows of a family differ in width and depth alone
    if network not in CHECKED:
        check_teacher(teacher)
        CHECKED.add(network)


@pytest.mark.parametrize("row", [r for r in ROWS if r.kind == "timm"], ids=lambda r: r.name)
def test_a_rows_licence_is_the_one_that_timm_states(row: Row) -> None:
    published = timm.get_pretrained_cfg(architecture_of(row))
    assert published is not None
    assert published.license == ("apache-2.0" if row.licence in OVERRULED else row.licence)


def test_names_are_unique_and_no_entry_is_listed_twice() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({str(row.entry) for row in ROWS}) == len(ROWS)


def test_every_encoder_of_the_eight_recipes_is_listed() -> None:
    listed = {(row.kind, row.model, row.weights) for row in ROWS}
    for path in sorted((REPOSITORY / "recipes").glob("upsampler_*.yaml")):
        entry = load_yaml(path)["teacher"]
        file = entry["kind"] == "radio"  # its weights are a path
        weights = None if file else entry.get("weights")
        assert (entry["kind"], entry["model"], weights) in listed, path.name


def test_every_radio_that_we_know_is_listed() -> None:
    assert {row.model for row in ROWS if row.kind == "radio"} == set(PUBLISHED)


def test_the_open_kinds_are_built_in_or_a_users_own() -> None:
    for kind in OPEN_KINDS:
        assert TEACHERS.is_built_in(kind.kind) or ":" in kind.kind


@pytest.mark.parametrize(
    "row", [r for r in ROWS if LICENCES[r.licence].limits], ids=lambda r: r.name
)
def test_a_licence_that_limits_the_student_says_so(row: Row) -> None:
    assert "; limits the student: " in licence_of(parse_teacher(row.entry))


@pytest.mark.parametrize(
    "entry, due",
    [
        ({"kind": "siglip", "model": "ViT-SO400M-14-SigLIP-384", "weights": "webli"}, "Apache-2.0"),
        ({"kind": "open_clip", "model": "ViT-B-16-quickgelu", "weights": "openai"}, "MIT"),
        ({"kind": "dfn_clip", "model": "clip_ti16_128"}, "Apache-2.0"),
        (
            {"kind": "timm", "model": "convnext_tiny.fb_in22k_ft_in1k"},  # of no row: timm knows
            "Apache-2.0",
        ),
        (
            {"kind": "timm", "model": "vit_so400m_patch14_siglip_gap_448.pali_mix"},
            "Gemma Terms of Use (gated); limits the student: models distilled from it are bound by "
            "its use restrictions",
        ),
        (
            {"kind": "timm", "model": "vit_base_patch14_dinov2.lvd142m", "weights": "none"},
            "random weights, no licence",
        ),
        (
            {"kind": "timm", "model": "vit_base_patch14_dinov2.lvd142m", "weights": "/data/x.pt"},
            "not known here; read it where /data/x.pt came from",
        ),
        (
            {"kind": "open_clip", "model": "coca_ViT-B-32", "weights": "laion2b_s13b_b90k"},
            "not known here; read it at https://huggingface.co/laion/"
            "CoCa-ViT-B-32-laion2B-s13B-b90k",
        ),
        (
            {"kind": "open_clip", "model": "RN50-quickgelu", "weights": "yfcc15m"},  # by timm
            "MIT",
        ),
        (
            {"kind": "open_clip", "model": "ViT-L-14", "weights": "/data/x.pt"},
            "not known here; read it where /data/x.pt came from",
        ),
        (
            {"kind": "hf", "model": "org/name"},
            "not known here; read it at https://huggingface.co/org/name",
        ),
    ],
)
def test_the_licence_of_a_recipes_teacher(entry: dict[str, Any], due: str) -> None:
    assert licence_of(parse_teacher(entry)) == due


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "radio", "model": "c-radio_v3-b"},
        {"kind": "dfn_clip", "model": "ViT-H-14-378-quickgelu"},
    ],
)
def test_a_local_file_is_taken_for_the_published_weights_of_its_model(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    (file := tmp_path / "weights.pt").touch()
    (row,) = [row for row in ROWS if row.model == entry["model"]]
    due = f"{LICENCES[row.licence]}; assuming that {file} holds the published weights"
    assert licence_of(parse_teacher(entry | {"weights": str(file)})) == due


def test_a_local_file_of_a_model_with_two_licences_is_not_guessed(tmp_path: Path) -> None:
    (file := tmp_path / "weights.pt").touch()  # DFN's or MetaCLIP's
    entry = {"kind": "dfn_clip", "model": "ViT-H-14-quickgelu", "weights": str(file)}
    assert licence_of(parse_teacher(entry)).startswith("not known here")


def test_the_command_prints_every_encoder_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    for each in (*ROWS, *OPEN_KINDS):
        assert each.kind in lines[each.name]
        assert each.model in lines[each.name]


@pytest.mark.parametrize("name", ["C-RADIOv4-H", "C-RADIOv4-SO400M", "RADIO-L"])
def test_a_radio_is_found_by_its_repository_and_says_that_it_is_a_local_folder(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"nvidia/{name}"]) == 0
    assert f"weights: FILE, or folder of nvidia/{name}  " in capsys.readouterr().out


def test_words_narrow_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dinov2", "REG4"]) == 0
    out = capsys.readouterr().out
    assert out.count("reg4_dinov2") == 4
    assert "DINOv3" not in out


def test_words_that_fit_nothing_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["DINOv4"])
    assert end.value.code == 2
    assert "no encoder matches 'DINOv4' (did you mean 'DINOv" in capsys.readouterr().err


def test_an_extra_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name == "transformers" else 1)
    assert main(["transformers"]) == 0
    assert "not here: needs transformers" in capsys.readouterr().out
