"""The table of all that ships: rows and columns are recipes', figures are the suites'."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.benchmarks.build import parse_benchmark
from distill.evaluation.models import parse_model
from tests.class_tree import write_colours
from tests.quality import suite_rows
from tests.quality.suite import main
from tests.quality.suite_rows import COLUMNS, STUDENT, benchmark_of, encoder_of, models, teachers
from tests.quality.suite_table import (
    best_teacher,
    changes,
    figures,
    markdown,
    shared_summaries,
    summarised,
)

DATA = Path("/nowhere")


def row(model: str, benchmark: str, value: float, seed: int = 0, lower: bool = False) -> Any:
    metric = COLUMNS[benchmark].metric or "figure"
    figures = {"other": 0.5, metric: value} if metric != "figure" else {metric: value}
    errors = [metric] if lower else []
    return {
        "model": model,
        "benchmark": benchmark,
        "seed": seed,
        "figures": figures,
        "lower_is_better": errors,
    }


RESULTS = [
    row("lite2", "camvid", 40, 0),
    row("lite2", "camvid", 42, 1),
    row("clip", "camvid", 20, 0),
    row("clip", "camvid", 20, 1),
    row("clip_tile_4x", "camvid", 44, 0),
    row("clip_tile_4x", "camvid", 48, 1),
    row("lite2", "depth", 1.0, 0, lower=True),
    row("clip", "depth", 0.8, 0, lower=True),
    row("clip_tile_4x", "depth", 0.6, 0, lower=True),
    row("lite2", "det200", 70),
    row("clip", "det200", 20),
]


def test_every_row_and_column_is_an_entry_that_the_product_parses() -> None:
    rows = models(DATA)
    assert [*teachers(DATA), STUDENT, "random", "colours"] == [
        name for name in rows if encoder_of(name, DATA) == name
    ]
    for name in ("clip", "siglip"):
        assert {f"{name}_{how}" for how in ("bilinear_4x", "tile_4x", "featsharp_2x")} <= set(rows)
    for name, entry in rows.items():
        if name != STUDENT:
            parse_model(entry)
    for column in COLUMNS.values():
        parsed = parse_benchmark(benchmark_of(column, DATA))
        assert parsed.dataset.root == DATA / column.root
    for _, text in suite_rows.TEXTS.values():
        parse_benchmark(suite_rows.zero_shot_of(text, DATA))
    assert parse_benchmark(benchmark_of(COLUMNS["det200"], DATA)).split == "leave_one_out"


def test_the_change_is_against_the_best_teacher_of_each_column() -> None:
    """CamVid 41 of lite2, depth 0.8 of clip, det200 70 of lite2."""
    columns = ["camvid", "depth", "det200"]
    rows: dict[str, Any] = {name: {} for name in ("lite2", "clip", "clip_tile_4x")}
    results = shared_summaries(RESULTS, rows, DATA)
    assert figures(results, "clip_tile_4x", "det200") == ([20], False)
    found = changes(results, "clip_tile_4x", columns, DATA)
    due = ((46 - 41) / 41 + (0.8 - 0.6) / 0.8 + (20 - 70) / 70) / 3
    assert found is not None
    assert found.mean == pytest.approx(100 * due)
    assert found.spread is not None
    assert [best_teacher(RESULTS, each, DATA) for each in columns] == ["lite2", "clip", "lite2"]
    assert best_teacher([], "camvid", DATA) is None
    lite2 = changes(results, "lite2", columns, DATA)
    assert lite2 is not None
    assert lite2.mean == pytest.approx(100 * (0 - 0.25 + 0) / 3)
    assert changes(results, "random", columns, DATA) is None


def test_the_table_marks_the_best_and_lacks_nothing_silently() -> None:
    rows: dict[str, Any] = {name: {} for name in ("lite2", "clip", "clip_tile_4x")}
    cost = {"millions": 4.8, "image": [260, 260], "grid": [9, 9], "ms": 41.2}
    columns = ["camvid", "depth", "det200"]
    lines = summarised(RESULTS, rows, columns, DATA, dict.fromkeys(rows, cost))
    text = markdown(lines, columns).splitlines()
    assert text[0].startswith("|  | M | px | cells | ms an image | CamVid, mIoU | NYU ")
    assert "| 41.0 ± 1.4 | 1.000 | **70.0** |" in text[2]
    assert "**46.0 ± 2.8** | **0.600** | – |" in text[4]
    assert text[2].startswith("| lite2 | 4.8 | 260 x 260 | 9 x 9 | 41.2 |")


def test_the_command_measures_keeps_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_colours(tmp_path / "det200")
    columns = {"det200": COLUMNS["det200"]}
    monkeypatch.setattr("tests.quality.suite.COLUMNS", columns)
    asked = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--models"]
    asked += [f"{STUDENT}_no,colours", "--seeds", "0"]
    with pytest.raises(SystemExit):
        main(asked)
    assert (
        "there is no name 'agglo_tiny_no' (did you mean 'agglo_tiny'?)" in capsys.readouterr().err
    )
    asked[5] = "colours"
    assert main(asked) == 0
    first = capsys.readouterr().out
    assert "| colours | 0 | 256 x 256 | 16 x 16 |" in first
    assert main(asked) == 0
    again = capsys.readouterr().out
    assert "kept from" in again
    assert again.splitlines()[-5:] == first.splitlines()[-5:]
    (line,) = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert line["figures"]["det200"]["seeds"] == 1
