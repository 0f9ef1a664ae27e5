"""Every encoder of the catalogue: its facts against the libraries, and its contract at toy size."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from teachers.build import build_teacher, parse_teacher
from teachers.catalog import find_rows, licence_of, main
from teachers.catalog_rows import OPEN_KINDS, PIXELS, ROWS, Row
from teachers.errors import TeacherError
from teachers.licences import LICENCES
from teachers.radio_teacher import PUBLISHED, timm
from teachers.testing import check_teacher
from tests.small_teachers import DEPTH, small_spec_side, small_teacher

# timm says Apache-2.0 where it was told nothing, and Apple's card has another licence by now.
OVERRULED = {
    "gemma": "apache-2.0",  # PaliGemma's own card
    "mit": "apache-2.0",  # Florence-2's own card
}

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def build(row: Row, **options: Any) -> Any:
    return build_teacher(parse_teacher(row.entry | options), device="meta")


def own_normalization(row: Row) -> tuple[tuple[float, ...], ...]:
    """What the library itself says."""
    if row.kind == "timm":
        cfg = timm.get_pretrained_cfg(row.model)
        assert cfg is not None
        return tuple(cfg.mean), tuple(cfg.std)
    if row.kind == "radio":
        return PUBLISHED[row.model][0].mean, PUBLISHED[row.model][0].std
    tag = open_clip.get_pretrained_cfg(row.model, str(row.weights))
    return tuple(tag["mean"]), tuple(tag["std"])


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
    features = teacher(torch.empty(2, 3, row.side, row.side, device="meta"))
    cells = row.side // row.patch
    assert features.spatial.shape == (2, row.width, cells, cells)
    assert (None if features.summary is None else features.summary.shape[1]) == row.summary
    check_teacher(teacher)


@rows
def test_a_row_says_which_other_sizes_there_are(row: Row) -> None:
    height, width = 2 * row.patch, 3 * row.patch
    other = torch.empty(1, 3, height, width, device="meta")
    if row.sizes == "any":
        assert build(row)(other).spatial.shape[2:] == (2, 3)
        return
    with pytest.raises(ValueError, match=f"{row.side} x {row.side} px only"):
        build(row)(other)
    asked = build(row, resolution=[height, width])
    assert asked(other).spatial.shape[2:] == (2, 3)
    assert asked.spec.any_resolution == (row.sizes == "asked")


@rows
def test_a_row_keeps_the_contract_at_toy_size(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = row.patch
    oblong = {} if row.sizes == "any" else {"resolution": [2 * patch, 3 * patch]}
    teacher = small_teacher(row, tmp_path, monkeypatch, **oblong)
    check_teacher(teacher)
    assert teacher.normalization == PIXELS[row.pixels]


def test_names_are_unique_and_no_entry_is_listed_twice() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({str(row.entry) for row in ROWS}) == len(ROWS)
