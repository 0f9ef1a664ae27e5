"""`distill.evaluation.throughput` under a clock that counts what the encoder is given."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from distill.evaluation import throughput
from distill.evaluation.break_even import break_even
from distill.evaluation.throughput_report import throughput_table
from distill.runtime.config import dump_yaml, load_recipe
from distill.runtime.errors import RecipeError
from teachers.errors import TeacherError
from teachers.features import Features
from teachers.teacher import Teacher
from teachers.timm_teacher import TimmTeacher

TINY = {"kind": "timm", "model": "test_vit", "weights": "none"}


def _write(folder: Path, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "task": "throughput",
        "dir": str(folder / "out"),
        "teachers": {"any": TINY | {"resolution": [32, 32]}},
        "upsamplers": {"tile": {"kind": "tile"}, "bilinear": {"kind": "bilinear"}},
        "factors": [1, 2, [2, 3], 3],
        "batch_size": 2,
        "rounds": 1,
    }
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(tree | sections))
    return path


def _load(folder: Path, **sections: Any) -> throughput.ThroughputRecipe:
    return load_recipe(throughput.ThroughputRecipe, _write(folder, **sections), [])


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the encoder takes time: u + u^2 / 2 seconds for u times its native tokens."""
    spent = 0.0
    extract = TimmTeacher.extract

    def counted(self: TimmTeacher, images: torch.Tensor) -> Features:
        nonlocal spent
        native = self.spec.resolution[0] * self.spec.resolution[1]
        u = images.shape[-2] * images.shape[-1] / native
        spent += len(images) * (u + u**2 / 2)
        return extract(self, images)

    monkeypatch.setattr(TimmTeacher, "extract", counted)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: spent)


@pytest.mark.long
@pytest.mark.usefixtures("_clock")
def test_times_an_image_and_a_token_follow_the_work_that_was_done(tmp_path: Path) -> None:
    rows, _ = throughput.measure_throughput(_load(tmp_path))
    seconds = {(r["method"], *r["factor"]): r["seconds_per_image"] for r in rows}
    assert seconds == pytest.approx(
        {
            **{("encoder", *f): f[0] * f[1] + (f[0] * f[1]) ** 2 / 2 for f in _FACTORS},
            **{("linear", *f): 1.5 * f[0] * f[1] for f in _FACTORS},
            **{("bilinear", *f): 1.5 for f in _FACTORS},
            **{("tile", *f): 1.5 * (1 + f[0] * f[1]) for f in _FACTORS if f != (1, 1)},
            ("tile", 1, 1): 1.5,
        }
    )
    wide = next(r for r in rows if r["factor"] == [2, 3] and r["method"] == "tile")
    assert wide["resolution"] == [64, 96]
    assert wide["tokens"] == 4 * 6
    assert wide["encoder_passes"] == 7
    assert all(
        r["seconds_per_token"] * r["tokens"] == pytest.approx(r["seconds_per_image"]) for r in rows
    )


_FACTORS = [(1, 1), (2, 2), (2, 3), (3, 3)]


@pytest.mark.usefixtures("_clock")
def test_break_even_is_where_both_do_the_same_work(tmp_path: Path) -> None:
    rows, crossings = throughput.measure_throughput(_load(tmp_path))
    found = {c["method"]: c for c in crossings}
    # 1.5 (1 + u) = u + u^2 / 2
    assert found["tile"]["factor"] == pytest.approx(((1 + 13**0.5) / 2) ** 0.5)
    assert found["bilinear"]["factor"] == pytest.approx(1)
    assert found["tile"]["fit_error"] < 1e-9
    screen = io.StringIO()
    Console(width=160, file=screen).print(throughput_table(rows, crossings))
    assert "1.52x" in screen.getvalue()
    assert "always" in screen.getvalue()


@pytest.mark.usefixtures("_clock")
def test_lines_and_picture_are_written(tmp_path: Path) -> None:
    rows, crossings = throughput.measure_throughput(_load(tmp_path))
    for name, expected in (("throughput", rows), ("break_even", crossings)):
        lines = (tmp_path / f"out/{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == expected
    with Image.open(tmp_path / "out/throughput.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    strong = {c for n, c in colours if n > 100 and max(c) - min(c) > 100}
    assert len(strong) >= 2  # a curve for each of two upsamplers


def test_an_encoder_of_one_size_is_timed_there_and_has_no_break_even(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = throughput.build_teacher

    def build_fixed(*args: Any, **kwargs: Any) -> Teacher:
        teacher = build(*args, **kwargs)
        teacher.spec = replace(teacher.spec, any_resolution=False)
        return teacher

    monkeypatch.setattr(throughput, "build_teacher", build_fixed)
    rows, crossings = throughput.measure_throughput(_load(tmp_path))
    assert [r["factor"] for r in rows if r["method"] == "encoder"] == [[1, 1]]
    assert crossings == []
    assert all(r["seconds_per_image"] > 0 for r in rows)


def test_all_take_turns_and_the_median_of_the_rounds_after_the_first_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _load(tmp_path, rounds=3, upsamplers={"tile": {"kind": "tile"}}, batch_size=1)
    called: list[int] = []

    def elapsed(call: Any, device: torch.device) -> float:
        called.append(len(called))
        place, number = called[-1] % cases, called[-1] // cases
        return place + (1000.0, 3.0, 1.0, 2.0)[number]

    cases = 4 + 4  # the encoder and tiles, at four factors each
    monkeypatch.setattr(throughput, "_elapsed", elapsed)
    rows, _ = throughput.measure_throughput(recipe)
    assert len(called) == 4 * cases
    measured = [r["seconds_per_image"] for r in rows if r["method"] != "linear"]
    assert measured == [place + 2.0 for place in range(cases)]


def test_an_upsampler_with_more_channels_than_its_encoder_is_timed_too(tmp_path: Path) -> None:
    both = {"s2": {"kind": "s2", "beta": None}, "featsharp": {"kind": "featsharp"}}
    rows, _ = throughput.measure_throughput(
        _load(tmp_path, upsamplers=both, precision="bf16", factors=[2, 3])
    )
    passes = {r["method"]: r["encoder_passes"] for r in rows if r["factor"] == [3, 3]}
    assert passes == {"encoder": None, "s2": 10, "featsharp": 10, "linear": None}


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"factors": [1, 2]}, "factors: give at least two of different size"),
        (
            {"upsamplers": {"a": {"kind": "tile", "factor": 2}}},
            "upsamplers.a: expected a kind and options",
        ),
        ({"upsamplers": {"linear": {"kind": "tile"}}}, "upsamplers.linear: this name is reserved"),
        ({"upsamplers": {"a": {"kind": "featsharpp"}}}, "did you mean 'featsharp'"),
        (
            {"teachers": {"t": TINY | {"upsampler": {"kind": "tile", "factor": 2}}}},
            "teachers.t.upsampler: move it to `upsamplers`",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_explained(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        _load(tmp_path, **sections)


@pytest.mark.parametrize("attention", [1e-6, 0.1, 3.0])
def test_break_even_solves_tiles_against_any_encoder(attention: float) -> None:
    def encoder(u: float) -> float:
        return u + attention * u**2

    def tiles(u: float) -> float:
        return (1 + u) * encoder(1)

    found = break_even({u: encoder(u) for u in (1, 4, 9)}, {u: tiles(u) for u in (4, 9)})
    if attention == 1e-6:  # hardly ever worth it; the closed form must not cancel
        assert found.factor == pytest.approx(attention**-0.25, rel=0.01)
        return
    assert found.factor is not None
    u = found.factor**2
    assert encoder(u) == pytest.approx(tiles(u))
    assert encoder(1.1 * u) > tiles(1.1 * u)
    assert found.fit_error < 1e-9


def test_break_even_never_comes_where_an_encoder_is_linear_and_cheaper() -> None:
    linear = {1: 1.0, 4: 4.0, 9: 9.0}
    assert break_even(linear, {4: 5.0, 9: 10.0}).factor is None
    assert break_even(linear, {4: 1.0, 9: 1.0}).factor == 1


def test_a_fit_says_how_far_it_is_off() -> None:
    encoder = {1: 1.0, 4: 4.0, 9: 12.0}
    assert break_even(encoder, {4: 5.0, 9: 10.0}).fit_error > 0.02


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model": "test_vitt"}, "teachers.second: model: 'test_vitt'.*did you mean 'test_vit"),
        ({"weights": "nowhere.pth"}, "teachers.second: weights: 'nowhere.pth' is not a file"),
    ],
)
def test_a_wrong_second_teacher_is_found_before_the_first_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    def refuse(*_: Any) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(throughput, "_elapsed", refuse)
    teachers = {"first": TINY | {"resolution": [32, 32]}, "second": TINY | wrong}
    with pytest.raises(TeacherError, match=message):
        throughput.measure_throughput(_load(tmp_path, teachers=teachers))
