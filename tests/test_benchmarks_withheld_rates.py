"""Learning rates that are compared on withheld training images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from distill.benchmarks.dense.probe_training import ProbeConfig
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from tests.test_benchmarks_segmentation import measure, write_set

PROBE = {"steps": 12, "batch_size": 4, "lr": [1e-4, 3e-3, 0.03]}


def first_images(source: Path, root: Path, kept: int) -> Path:
    """The first training images of a set to train on, and the others to test on."""
    for folder in ("images", "annotations"):
        files = sorted((source / folder / "training").iterdir())
        for part, chosen in (("training", files[:kept]), ("validation", files[kept:])):
            (root / folder / part).mkdir(parents=True)
            for file in chosen:
                shutil.copy(file, root / folder / part)
    return root


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"probe": PROBE | {"mode": "cached"}},
        {"probe": PROBE | {"mode": "online"}},
        {"probe": PROBE | {"mode": "cached"}, "input": {"crop": [6, 6], "stride": [4, 4]}},
    ],
    ids=["cached", "online", "windows"],
)
def test_rates_are_compared_as_on_a_set_of_their_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    write_set(tmp_path / "set", counts=(8, 3), noise=200)
    withheld = options | {"probe": options["probe"] | {"withheld": 0.25}}
    figures, _ = measure(tmp_path / "set", tmp_path / "out", **withheld)
    compared = json.loads((tmp_path / "out/withheld.json").read_text())
    by_rate = {rate: scores["segmentation"]["miou"] for rate, scores in compared.items()}

    part = first_images(tmp_path / "set", tmp_path / "part", kept=6)
    measure(part, tmp_path / "alone", **options)
    assert by_rate == json.loads((tmp_path / "alone/miou_by_lr.json").read_text())

    best = max(by_rate, key=lambda rate: by_rate[rate])
    chosen = options | {"probe": options["probe"] | {"lr": float(best)}}
    assert figures == measure(tmp_path / "set", tmp_path / "best", **chosen)[0]


def test_test_images_choose_no_rate(tmp_path: Path) -> None:
    """Their labels are exchanged, so that the rate that learns most is the worst on them."""
    write_set(tmp_path / "set", counts=(8, 3))
    for file in (tmp_path / "set/annotations/validation").iterdir():
        shutil.copy(tmp_path / "set/annotations/training/0.png", file)
    probe = {"steps": 40, "batch_size": 4, "lr": [1e-6, 0.05], "mode": "cached"}
    measure(tmp_path / "set", tmp_path / "out", probe=probe | {"withheld": 0.25})
    assert list(json.loads((tmp_path / "out/miou_by_lr.json").read_text())) == ["0.05"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [0.01], "withheld": 0.2}, "compares learning rates; lr has only one"),
        ({"withheld": 1.0}, "withheld"),
    ],
)
def test_withholding_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(ProbeConfig, PROBE | changes, "probe")


def test_too_few_images_to_withhold_are_named(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with pytest.raises(DataError, match=r"0.1 of 4 training images leaves 4 to train on and 0 to"):
        measure(tmp_path / "set", tmp_path / "out", probe=PROBE | {"withheld": 0.1})
