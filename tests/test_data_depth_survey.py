"""The survey of depth sets: what is known, what the range drops, and depth in another unit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from data.labelled.depth import AnyDepth
from data.labelled.depth_survey import DepthSurvey
from data.labelled.survey import told
from tests.label_sets import metres, write_depth

ROOM = (0.001, 10.0)
STREET = (0.001, 80.0)


def judged(
    root: Path, train: Any, test: Any = None, limits: Any = ROOM, **options: Any
) -> tuple[str, str]:
    """What is fatal, and what is not."""
    entry = write_depth(root, [train], None if test is None else [test])
    survey = DepthSurvey(TypeAdapter(AnyDepth).validate_python(entry | options), limits)
    findings = survey.judge(survey.count())
    return tuple(  # type: ignore[return-value]
        "; ".join(told(f for f in findings if f.fatal is wanted)) for wanted in (True, False)
    )


def as_png(depth: np.ndarray, steps_a_metre: float) -> np.ndarray:
    return (depth * steps_a_metre).round().astype(np.uint16)


def test_depth_in_millimetres_is_right(tmp_path: Path) -> None:
    assert judged(tmp_path, as_png(metres(), 1000)) == ("", "")


def test_metres_read_as_millimetres_are_refused_with_the_unit(tmp_path: Path) -> None:
    fatal, _ = judged(tmp_path, metres())
    assert "the known depths of train are 0.000783 to 0.00892 m (1 to 99 %)" in fatal
    assert "dataset.unit is 0.001 m a step: did you mean dataset.unit=1 (metres)" in fatal


def test_the_unit_that_is_named_is_right(tmp_path: Path) -> None:
    assert judged(tmp_path, metres(), unit=1.0) == ("", "")


@pytest.mark.parametrize(
    "steps, limits, unit, name",
    [
        (256, STREET, "0.00390625", "KITTI"),
        (5000, ROOM, "0.0002", "TUM"),
        (100, ROOM, "0.01", "centimetres"),
    ],
)
def test_other_units_of_published_sets_are_named(
    tmp_path: Path, steps: int, limits: Any, unit: str, name: str
) -> None:
    depth = metres(2.0, 76.0) if limits is STREET else metres()
    fatal, warned = judged(tmp_path, as_png(depth, steps), limits=limits)
    assert f"dataset.unit={unit} ({'' if name == 'centimetres' else '1/'}" in fatal + warned
    assert name in fatal + warned


def test_kitti_in_the_range_of_rooms_is_refused(tmp_path: Path) -> None:
    far = metres(20.0, 76.0)
    fatal, _ = judged(tmp_path, as_png(far, 256))
    assert "of them in depth_range [0.001, 10]" in fatal


def test_a_range_that_ends_too_near_is_named_beside_the_units(tmp_path: Path) -> None:
    fatal, _ = judged(tmp_path, as_png(metres(2.0, 76.0), 256), unit=1 / 256)
    assert "1/5000 m, as TUM), or a farther depth_range?" in fatal


def test_eight_bits_read_as_millimetres_are_refused(tmp_path: Path) -> None:
    values = (metres() * 25.5).round().astype(np.uint8)
    fatal, _ = judged(tmp_path, values)
    assert "its 8 bits reach 0.255 m of 10 m only" in fatal
    assert "dataset.unit=0.0392157 (10 m / 255, as 8 bit)" in fatal
    assert judged(tmp_path, values, unit=10 / 255) == ("", "")


def test_what_the_range_drops_is_counted(tmp_path: Path) -> None:
    depth = metres(0.5, 13.0)
    fatal, warned = judged(tmp_path, as_png(depth, 1000))
    dropped = int((depth.round(3) > 10).sum())
    assert not fatal
    assert f"0 pixels nearer, {dropped} farther" in warned
    assert f"{100 * dropped / depth.size:.3g} % of the known depths of train are outside" in warned


def test_a_few_pixels_beyond_the_range_are_a_note(tmp_path: Path) -> None:
    depth = metres(0.5, 10.2)
    entry = write_depth(tmp_path, [as_png(depth, 1000)])
    survey = DepthSurvey(TypeAdapter(AnyDepth).validate_python(entry), ROOM)
    findings = survey.judge(survey.count())
    assert [finding.note for finding in findings] == [True, True]
    assert f"{int((depth.round(3) > 10).sum())} farther" in findings[0].text


@pytest.mark.parametrize("empty", ["train", "test"])
def test_depth_of_zeros_is_refused(tmp_path: Path, empty: str) -> None:
    good, nothing = as_png(metres(), 1000), np.zeros((12, 16), np.uint16)
    splits = {"train": good, "test": good} | {empty: nothing}
    fatal, _ = judged(tmp_path, **splits)
    assert fatal == f"no pixel of {empty} has a known depth: all are 0, negative or not finite"


def test_splits_in_two_units_are_refused(tmp_path: Path) -> None:
    fatal, _ = judged(tmp_path, metres(0.6, 9.0), metres(0.02, 0.3) / 3, unit=1.0)
    assert "known depths of test" in fatal
    fatal, _ = judged(tmp_path, metres(5.0, 9.0), metres(0.2, 0.6) / 2, unit=1.0, limits=(0.01, 9))
    assert "the median depth is 7 m in train and 0.2 m in test: are the splits in one" in fatal


def test_normals_need_a_known_pixel_in_each_split(tmp_path: Path) -> None:
    good, nothing = as_png(metres(), 1000), np.zeros((12, 16), np.uint16)
    fatal, _ = judged(tmp_path, good, nothing, limits=None, focal_px=20.0)
    assert fatal == "no pixel of test has a known depth"
    assert judged(tmp_path, good, good, limits=None, focal_px=20.0) == ("", "")
