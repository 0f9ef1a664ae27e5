"""Fidelity of upsamplers: closed forms, a step-by-step reference, and the commands."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import evaluate
from distill.benchmarks.upsampling import (
    UpsamplerEvaluationConfig,
    UpsamplerPair,
    UpsamplingFidelity,
    held_out_views,
    measure_upsamplers,
)
from distill.evaluation import comparison
from distill.evaluation.comparison import comparison_table
from distill.runtime.checkpoint import save_checkpoint
from distill.runtime.config import dump_yaml
from teachers.build import build_teacher, parse_teacher
from teachers.features import Features, FeatureSpec
from teachers.fingerprint import teacher_fingerprint
from teachers.phi_s import FeatureStatistics, fit_phi_s
from teachers.teacher import Teacher
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.downsampler import AttentionDownsampler, BoxDownsampler
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.trained import UpsamplerCard, save_upsampler
from teachers.upsamplers.upsampler import Encode, UpsampledFeatures, Upsampler
from teachers.upsamplers.views import valid_mask, warp, warp_images
from tests.doubles import MeanColours
from tests.tiny_run import write_images

NATIVE, PATCH = (24, 32), 4
EXPERT = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 32]}


def _cells(*, any_resolution: bool = True) -> MeanColours:
    """A larger image has a denser map, and no other."""
    return MeanColours(PATCH, NATIVE, any_resolution=any_resolution)


class _Dense(Upsampler):
    """The encoder's own map of the whole image, times a gain, plus noise."""

    def __init__(
        self, spec: FeatureSpec, factor: tuple[int, int], gain: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(spec, factor)
        self.gain, self.noise = gain, noise
        self._generator = torch.Generator().manual_seed(7)

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        whole = encode(images)
        noise = torch.randn(whole.spatial.shape, generator=self._generator)
        high = self.gain * whole.spatial + self.noise * noise
        return UpsampledFeatures(whole, Features(None, high))

    @property
    def num_forwards(self) -> int:
        return 1


class _Fixed(_Dense):
    """The same map for every image."""

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int], high: Tensor) -> None:
        super().__init__(spec, factor)
        self.high = high

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        high = self.high.expand(len(images), -1, -1, -1)
        return UpsampledFeatures(encode(F.interpolate(images, NATIVE)), Features(None, high))


def _images(count: int, factor: tuple[int, int] = (2, 2)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (factor[0] * NATIVE[0], factor[1] * NATIVE[1])
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def _still(count: int, num_views: int = 1) -> Tensor:
    return torch.eye(3, dtype=torch.float64).expand(count, num_views, 3, 3)


def _candidate(inner: Upsampler, images: Tensor) -> UpsamplerPair:
    """An upsampler whose PHI-S is fitted to the very cells that still views have."""
    statistics = FeatureStatistics.zeros(3)
    cell = (inner.factor[0] * PATCH, inner.factor[1] * PATCH)
    statistics.update(F.avg_pool2d(images.float() / 255, cell))
    return UpsamplerPair(
        Standardised(inner, fit_phi_s(statistics), bias=False), BoxDownsampler(inner.factor)
    )


def _measure(
    inner: Upsampler, images: Tensor, views: Tensor, teacher: Teacher | None = None, batch: int = 8
) -> UpsamplingFidelity:
    candidates = {"it": _candidate(inner, images)}
    return measure_upsamplers(candidates, teacher or _cells(), images, views, batch)["it"]


def test_the_best_constant_has_fidelity_1() -> None:
    images, cells = _images(5), 5 * 6 * 8
    figures = _measure(_Dense(_cells().spec, (2, 2), gain=0), images, _still(5, 2))
    unbiased = cells / (cells - 1)  # PHI-S divides by one cell less, as covariances do
    assert figures[:2] == pytest.approx((unbiased, unbiased), rel=1e-5)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_noise_of_std_s_has_fidelity_1_over_s_squared_and_a_box_averages_it(std: float) -> None:
    images = _images(60)
    figures = _measure(_Dense(_cells().spec, (2, 2), noise=std), images, _still(60))
    assert figures.true == pytest.approx(1 / std**2, rel=0.03)
    assert figures.box == figures.own == pytest.approx(4 / std**2, rel=0.03)


def test_a_perfect_upsampler_of_a_box_consistent_encoder_is_as_good_as_rounding_allows() -> None:
    figures = _measure(_Dense(_cells().spec, (2, 2)), _images(3), _still(3, 2))
    assert min(figures.own, figures.box) > 1e9
    assert figures.true is not None
    assert figures.true > 1e9


def test_warped_views_are_measured_as_a_step_by_step_reference_over_valid_cells_does() -> None:
    teacher, factor = _cells(), (3, 2)
    images = _images(5, factor)
    views = held_out_views(
        UpsamplerEvaluationConfig(images=Path("x"), num_views=2), 5, teacher.spec
    )
    views = views.clone()
    views[0, 0, 0, 2] += 0.4  # a view that leaves the image
    candidate = _candidate(_Dense(teacher.spec, factor), images)
    phi_s = candidate.upsampler.phi_s
    pixels, errors = images.float() / 255, []
    for i in range(5):
        for j in range(2):
            seen = F.avg_pool2d(
                warp_images(pixels[i : i + 1], views[i : i + 1, j : j + 1], NATIVE), 4
            )
            high = phi_s(F.avg_pool2d(pixels[i : i + 1], PATCH)).double()
            shown = F.avg_pool2d(warp(high, views[i, j][None], high.shape[-2:]), factor)
            square = (shown - phi_s(seen)).square().mean(1)[0]
            inside = valid_mask(views[i, j][None], square.shape)[0, 0] > 0
            errors += square[inside].tolist()
    assert len(errors) < 5 * 2 * 6 * 8 - 12
    for batch in (1, 2, 8):
        figures = measure_upsamplers({"it": candidate}, teacher, images, views, batch)["it"]
        assert figures.box == pytest.approx(len(errors) / sum(errors), rel=1e-4)


def test_own_takes_the_downsampler_that_was_learned_along() -> None:
    images = _images(3)
    box = _candidate(_Dense(_cells().spec, (2, 2), noise=1.0), images)
    learned = AttentionDownsampler(3, (2, 2))
    figures = measure_upsamplers(
        {"it": UpsamplerPair(box.upsampler, learned)}, _cells(), images, _still(3), 8
    )["it"]
    assert figures.own != pytest.approx(figures.box, rel=0.01)


def test_every_method_sees_the_same_views_which_depend_on_the_seed_alone() -> None:
    config = UpsamplerEvaluationConfig(images=Path("x"), num_views=3)
    spec, images = _cells().spec, _images(4)
    torch.manual_seed(1)
    views = held_out_views(config, 4, spec)
    torch.manual_seed(2)
    assert torch.equal(views, held_out_views(config, 4, spec))
    other = config.model_copy(update={"seed": 1})
    assert not torch.equal(views, held_out_views(other, 4, spec))
    candidates = {name: _candidate(_Dense(spec, (2, 2)), images) for name in "ab"}
    teacher = _cells()
    figures = measure_upsamplers(candidates, teacher, images, views, 3)
    assert figures["a"] == figures["b"]
    # The views, the true map, and once for each method.
    assert sum(map(len, teacher.seen)) == 4 * (3 + 1 + 2)


@pytest.mark.parametrize("factor, any_resolution", [((2, 2), False), ((1, 1), True)])
def test_there_is_no_true_map_at_factor_1_or_where_the_encoder_takes_one_size(
    factor: tuple[int, int], any_resolution: bool
) -> None:
    teacher = _cells(any_resolution=any_resolution)
    high = torch.randn(1, 3, 6 * factor[0], 8 * factor[1])
    candidates = {"it": _candidate(_Fixed(teacher.spec, factor, high), _images(2, factor))}
    figures = measure_upsamplers(candidates, teacher, _images(2, factor), _still(2), 8)["it"]
    assert figures.true is None
    assert (figures.seam_ratio is None) == (factor == (1, 1))


def test_a_jump_at_the_seams_is_seen_against_alike_places_elsewhere() -> None:
    columns = torch.arange(16.0) + 2.0 * (torch.arange(16) >= 8)  # steps of 1, and 3 at the seam
    columns = columns + 0.5 * (
        torch.arange(16) % 2
    )  # 1.5 within a cell of the encoder, 0.5 between
    high = columns.expand(1, 3, 6, 16)
    figures = _measure(_Fixed(_cells().spec, (1, 2), high), _images(2, (1, 2)), _still(2))
    assert figures.seam_ratio == pytest.approx((2.5 / 0.5) ** 2)


def test_maps_that_are_not_finite_are_refused() -> None:
    inner = _Dense(_cells().spec, (2, 2), gain=float("nan"))
    with pytest.raises(RuntimeError, match="the maps are not finite"):
        _measure(inner, _images(2), _still(2))


def test_views_that_see_nothing_of_their_image_are_refused() -> None:
    away = _still(2).clone()
    away[..., 0, 2] = 5.0
    with pytest.raises(RuntimeError, match="no cell of any view"):
        _measure(_Dense(_cells().spec, (2, 2)), _images(2), away)


# The commands, on runs whose upsamplers were never trained.


def _write_run(
    folder: Path, kind: str, factor: int, seed: int, fingerprint: str | None = None
) -> None:
    """A run folder of `train_upsampler`, as it stands after step 3."""
    expert = build_teacher(parse_teacher(EXPERT))
    torch.manual_seed(seed)
    config = parse_upsampler({"kind": kind, "factor": factor})
    assert config is not None
    statistics = FeatureStatistics.zeros(expert.spec.spatial_dim)
    statistics.update(expert(torch.rand(64, 3, 32, 32)).spatial)
    upsampler = Standardised(build_upsampler(config, expert.spec), fit_phi_s(statistics))
    downsampler = AttentionDownsampler(expert.spec.spatial_dim, (factor, factor))
    recipe = {
        "task": "upsampler",
        "run": {"dir": str(folder), "steps": 3, "batch_size": 4, "seed": seed},
        "data": {"sources": [{"shards": str(folder / "shards")}]},
        "teacher": EXPERT,
        "upsampler": {"kind": kind, "factor": factor},
    }
    card = UpsamplerCard(
        upsampler=config.model_dump(mode="json"),
        bias=True,
        spec=expert.spec,
        teacher=EXPERT,
        fingerprint=fingerprint or teacher_fingerprint(expert),
        facts={"recipe": recipe, "versions": {"torch": torch.__version__}},
    )
    own = {f"downsampler.{name}": value for name, value in downsampler.state_dict().items()}

    def write(checkpoint: Path) -> None:
        save_upsampler(checkpoint / "upsampler.safetensors", upsampler.state_dict() | own, card)
        (checkpoint / "recipe.yaml").write_text(dump_yaml(recipe))

    save_checkpoint(folder / "checkpoints", 3, write, {}, keep=2)
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, one with two seeds, at factor 2, one at factor 3, and held-out images."""
    folder = tmp_path_factory.mktemp("made")
    write_images(folder / "held-out", 3)
    for name, kind, factor, seed in (
        ("bilinear-0", "bilinear", 2, 0),
        ("featup-0", "featup", 2, 0),
        ("featup-1", "featup", 2, 1),
        ("three", "bilinear", 3, 0),
    ):
        _write_run(folder / name, kind, factor, seed)
    _write_run(folder / "stranger", "bilinear", 2, 0, fingerprint="0" * 64)

    def write(checkpoint: Path) -> None:
        (checkpoint / "student.safetensors").touch()

    save_checkpoint(folder / "student" / "checkpoints", 3, write, {}, keep=2)
    return folder


def _comparison(made: Path, out: Path, **sections: Any) -> Path:
    methods = {"bilinear": ["bilinear-0"], "featup": ["featup-0", "featup-1"], "3x": ["three"]}
    recipe = {
        "task": "upsamplers",
        "dir": str(out / "out"),
        "teacher": EXPERT,
        "methods": {name: [str(made / f) for f in files] for name, files in methods.items()},
        "evaluation": {"images": str(made / "held-out"), "num_views": 2, "batch_size": 2},
    } | sections
    (out / "recipe.yaml").write_text(dump_yaml(recipe))
    return out / "recipe.yaml"


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "150")
    try:
        evaluate.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "fidelity.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.long
def test_a_comparison_writes_a_line_a_file_with_its_protocol_and_a_picture_a_factor(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _call(monkeypatch, _comparison(made, tmp_path)) == 0
    rows = _lines(tmp_path / "out")
    assert [(r["method"], r["factor"], r["training"]["seed"]) for r in rows] == [
        ("bilinear", [2, 2], 0),
        ("featup", [2, 2], 0),
        ("featup", [2, 2], 1),
        ("3x", [3, 3], 0),
    ]
    for row in rows:
        assert row["training"]["images_seen"] == 12
        assert row["training"]["steps"] == 3
        assert row["images"] == [f"{i}.png" for i in range(3)]
        assert row["view_seed"] == 0
        assert row["views"]["num_views"] == 2
        assert row["fingerprint"] == teacher_fingerprint(build_teacher(parse_teacher(EXPERT)))
        assert row["teacher"]["model"] == "test_vit"
        assert row["own"] > 0
        assert row["box"] > 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "panels_2x2.png",
        "panels_3x3.png",
    ]
    assert " ± " in capsys.readouterr().out


def test_a_run_measures_as_its_line_in_a_comparison(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _call(monkeypatch, _comparison(made, tmp_path)) == 0
    wanted = {r["method"]: r for r in _lines(tmp_path / "out")}["bilinear"]
    options = [f"evaluation.images={made / 'held-out'}", "evaluation.num_views=2"]
    for target in ("", "checkpoints/step-00000003"):
        assert _call(monkeypatch, made / "bilinear-0" / target, *options) == 0
        (row,) = _lines(made / "bilinear-0/evaluation")
        assert [row[k] for k in ("own", "box", "true")] == pytest.approx(
            [wanted[k] for k in ("own", "box", "true")]
        )


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"evaluation": {"images": "absent"}}, "evaluation.images: there is no .*/absent; set it"),
        (
            {"methods": {"a": ["bilinear-0", "three"]}},
            "methods.a: its files have the factors 2 x 2",
        ),
        ({"methods": {"a": ["none.safetensors"]}}, "methods.a: .*there is no such file"),
        ({"methods": {"a": ["held-out"]}}, "no complete checkpoint in .*held-out"),
        ({"methods": {"a": ["student"]}}, "methods.a: student is a run without an up"),
        ({"methods": {"a": []}}, "methods.a: expected at least 1 item"),
        ({"teacher": EXPERT | {"resolution": [48, 48]}}, "methods.bilinear: .*another encoder"),
        ({"methods": {"a": ["stranger"]}}, "methods.a: .*other weights or options"),
        (
            {"teacher": EXPERT | {"upsampler": {"kind": "bilinear", "factor": 2}}},
            "teacher.upsampler: `methods` has the upsamplers",
        ),
        ({"task": "upsampler_"}, r"'upsampler_' is unknown \(did you mean 'upsampler'\?\)"),
    ],
)
def test_mistakes_are_told_apart(
    made: Path,
    tmp_path: Path,
    sections: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    assert _call(monkeypatch, _comparison(made, tmp_path, **sections)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_run_without_a_section_evaluation_says_what_to_add(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, made / "bilinear-0") == 2
    assert "add evaluation.images=FOLDER" in capsys.readouterr().err


def test_missing_images_are_a_mistake_before_the_teacher_is_built(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "build_teacher", lambda *a, **k: pytest.fail("built it"))
    assert _call(monkeypatch, made / "bilinear-0", "evaluation.images=absent") == 2
    assert "evaluation.images: there is no" in capsys.readouterr().err


def test_the_table_has_means_and_spreads_and_the_best_of_each_factor_in_bold() -> None:
    def row(method: str, factor: int, own: float, true: float | None) -> dict[str, Any]:
        figures = {"own": own, "box": 1.0, "true": true, "seam_ratio": None}
        training = {"training": {"images_seen": 8}}
        return {"method": method, "factor": [factor, factor]} | figures | training

    rows = [row("a", 2, 1, 5), row("a", 2, 3, 7), row("b", 2, 2.5, None), row("a", 4, 1, None)]
    cells = {str(c.header): list(c.cells) for c in comparison_table(rows).columns}
    assert cells["method"] == ["a", "b", "a"]
    assert cells["seeds"] == ["2", "1", "1"]
    assert cells["own"] == ["2.000 ± 1.414", "[bold]2.500[/bold]", "[bold]1.000[/bold]"]
    assert cells["true"] == ["[bold]6.000 ± 1.414[/bold]", "-", "-"]
    assert cells["seam ratio"] == ["-", "-", "-"]
