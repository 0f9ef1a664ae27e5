"""The quickstart's photographs: there, freely licensed, and never both trained and tested on."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data import photographs
from data.errors import DataError
from data.photographs import PHOTOGRAPHS, main, windows, write_photographs


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    assert write_photographs(folder) == (38, 3)
    return folder


def test_the_folders_hold_forty_or_so_crops_and_three_whole_photographs(out: Path) -> None:
    crops = sorted((out / "photographs").iterdir())
    assert len(crops) == 38
    for crop in crops:
        with Image.open(crop) as image:
            assert image.mode == "RGB"
            assert image.width == image.height
            assert 256 <= image.width <= 512
    whole = sorted(path.name for path in (out / "held-out").iterdir())
    assert whole == ["chelsea.png", "china.jpg", "coffee.png"]


def test_a_held_out_photograph_gives_no_crop(out: Path) -> None:
    origins = {path.stem.rsplit("_", 1)[0] for path in (out / "photographs").iterdir()}
    assert origins.isdisjoint(path.stem for path in (out / "held-out").iterdir())


def test_every_licence_is_free_and_every_file_is_listed_with_it(out: Path) -> None:
    text = (out / "LICENCES.md").read_text()
    for photograph in PHOTOGRAPHS:
        assert photograph.licence.startswith(("public domain", "CC0", "[CC BY 2.0]"))
        stem = Path(photograph.file).stem
        name = f"photographs/{stem}_*.jpg" if photograph.scales else f"held-out/{photograph.file}"
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        for fact in (photograph.author, photograph.licence, photograph.source):
            assert fact in line


def test_writing_again_changes_no_byte(out: Path) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    write_photographs(out)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_windows_stay_inside_and_touch_every_corner() -> None:
    assert windows(50, 50, (1.0,)) == [(0, 0, 50, 50)]
    assert windows(80, 50, (1.0,)) == [(0, 0, 50, 50), (30, 0, 80, 50)]
    assert windows(80, 50, (0.6,)) == [
        (0, 0, 30, 30),
        (50, 0, 80, 30),
        (0, 20, 30, 50),
        (50, 20, 80, 50),
    ]


def test_a_missing_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["photographs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "run `pip install scikit-image scikit-learn`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_library_without_the_photograph_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: elsewhere)
    with pytest.raises(DataError, match=r"data/astronaut.png: this version of scikit-image"):
        write_photographs(tmp_path / "out")


def test_a_folder_that_is_a_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_photographs(tmp_path / "file")
