"""Statistics of targets: estimated once over all ranks, stored, applied."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.runtime.stopping import Stopped, listening
from distill.targets.ensemble import Ensemble
from distill.targets.source import LiveTargets
from distill.targets.target_statistics import (
    CalibrationBatch,
    Statistics,
    StatisticsPass,
    angular_dispersion,
)
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
from tests.ranks import run_on_ranks


class PatchMean(Teacher):
    """Mean colour of 8 px patches, times a mixing matrix; the summary is the image's."""

    def __init__(self) -> None:
        spec = FeatureSpec(
            summary_dim=3, spatial_dim=3, patch_size=8, resolution=(16, 16), any_resolution=True
        )
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
        self.register_buffer("mixing", mixing)

    def extract(self, images: Tensor) -> Features:
        maps = torch.nn.functional.avg_pool2d(images, 8)
        maps = torch.einsum("dc,bchw->bdhw", self.mixing, maps)
        return Features(maps.mean((2, 3)), maps)


def _calibration_batches(batches: Sequence[Tensor], ranks: int = 1) -> Iterator[CalibrationBatch]:
    """One batch a step, of each of `ranks`."""
    for step, images in enumerate(batches):
        yield CalibrationBatch(images, {"t": "auto"}, {"t": step * len(images) * ranks})


def _images(count: int = 32) -> Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def _ensemble() -> Ensemble:
    return Ensemble({"t": PatchMean()}, student_patch=8)


def _fit(statistics: Statistics, folder: Path, facts: dict[str, object]) -> dict[str, str]:
    shown = _calibration_batches(_images().split(4))
    return statistics.fit(_ensemble(), shown, folder, facts, 32)


def fit_on_ranks(folder: str) -> tuple[Tensor, Tensor, Tensor, str]:
    """Each rank sees its share of the images, in batches of 4."""
    batches = _images().split(4)[distributed.rank() :: distributed.world_size()]
    shown = _calibration_batches(batches, distributed.world_size())
    statistics = Statistics()
    outcome = statistics.fit(_ensemble(), shown, Path(folder), {"data": 1}, 32)
    phi_s, dispersion = statistics.of["t"]
    return phi_s.alpha * phi_s.rotation, phi_s.mean, dispersion, outcome["t"]


@pytest.mark.process
def test_statistics_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    alone = run_on_ranks(1, fit_on_ranks, str(tmp_path / "1"))[0]
    for shared in run_on_ranks(2, fit_on_ranks, str(tmp_path / "2")):
        for one, two in zip(alone[:3], shared[:3], strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        assert shared[3] == "estimated"


def test_standardised_targets_have_mean_0_and_variance_1_and_are_estimated_once(
    tmp_path: Path,
) -> None:
    for expected in ("estimated", "cached"):
        statistics = Statistics()
        assert _fit(statistics, tmp_path, {"data": 1}) == {"t": expected}
        targets = LiveTargets(_ensemble(), statistics)
        maps = targets(_images())["t"].spatial.double().movedim(1, 0).flatten(1)
        assert maps.mean(1).abs().max() < 1e-5
        torch.testing.assert_close(
            maps.var(1), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0
        )


def test_without_a_student_a_teacher_sees_its_native_resolution(tmp_path: Path) -> None:
    """Also where that is no multiple of its patch, though it takes any that is."""
    teacher = PatchMean()
    teacher.spec = replace(teacher.spec, resolution=(18, 26), any_resolution=True)
    seen: list[tuple[int, ...]] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    shown = _calibration_batches(_images().split(4))
    Statistics().fit(Ensemble({"t": teacher}, student_patch=None), shown, tmp_path, {}, 8)
    assert seen == [(18, 26)] * 2
    maps = Ensemble({"t": teacher}, student_patch=8)(_images(1))["t"].spatial
    assert maps.shape[2:] == (2, 3)


def test_other_data_are_estimated_anew(tmp_path: Path) -> None:
    for facts in ({"data": 1}, {"data": 2}):
        assert _fit(Statistics(), tmp_path, facts) == {"t": "estimated"}


def test_a_checkpoints_statistics_win_over_what_was_estimated_since(tmp_path: Path) -> None:
    first, second = Statistics(), Statistics()
    _fit(first, tmp_path / "one", {})
    first.save(tmp_path / "checkpoint")
    shown = _calibration_batches((_images() ** 3).split(4))
    second.fit(_ensemble(), shown, tmp_path / "two", {}, 32)
    due, other = first.dispersions()["t"], second.dispersions()["t"]
    assert due > 0
    assert due != other
    second.load(tmp_path / "checkpoint", ["t"])
    assert torch.equal(second.dispersions()["t"], due)
    features = _ensemble()(_images(3))["t"]
    assert torch.equal(second.apply("t", features).spatial, first.apply("t", features).spatial)


def test_a_checkpoint_without_a_teachers_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"t\.safetensors: missing or damaged"):
        Statistics().load(tmp_path / "nothing", ["t"])


def test_dispersion_is_the_mean_squared_angle_to_the_mean_direction() -> None:
    half_turn = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert angular_dispersion(half_turn) == pytest.approx((torch.pi / 4) ** 2)


def test_a_teacher_without_summary_has_dispersion_one() -> None:
    spec = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=8, resolution=(16, 16))
    statistics = StatisticsPass(spec)
    statistics.update(Features(None, torch.randn(3, 4, 2, 5)))
    assert statistics.finish().dispersion == 1


class Counted(PatchMean):
    """Counts the images that it sees, under the fingerprint of its class."""

    fingerprinted_as = "PatchMean"

    def __init__(self) -> None:
        super().__init__()
        self.count = [0]

    def extract(self, images: Tensor) -> Features:
        self.count[0] += len(images)
        return super().extract(images)


def _fit_asked_to_stop(folder: Path, at: int | None) -> tuple[Statistics, int]:
    """Fits on 8 batches of 4; asked to stop while the teacher sees batch number `at`."""
    statistics, teacher = Statistics(), Counted()

    def ask(number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)

    def asking() -> Iterator[CalibrationBatch]:
        for number, batch in enumerate(_calibration_batches(_images().split(4))):
            ask(number)
            yield batch

    with listening():
        statistics.fit(Ensemble({"t": teacher}, student_patch=8), asking(), folder, {}, 32)
    return statistics, teacher.count[0]


def test_a_pass_that_was_stopped_goes_on_where_it_was_and_gives_the_same_bits(
    tmp_path: Path,
) -> None:
    whole, count = _fit_asked_to_stop(tmp_path / "whole", None)
    assert count == 32
    with pytest.raises(Stopped):
        _fit_asked_to_stop(tmp_path / "parts", 5)
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    resumed, count = _fit_asked_to_stop(tmp_path / "parts", None)
    assert count == 32 - 5 * 4
    for name, value in whole.of["t"].phi_s.state_dict().items():
        assert torch.equal(value, resumed.of["t"].phi_s.state_dict()[name]), name
    assert whole.of["t"].dispersion == resumed.of["t"].dispersion
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == [
        "t.json",
        "t.safetensors",
    ]


def test_a_teacher_that_is_done_is_kept_though_the_pass_is_stopped(tmp_path: Path) -> None:
    """The first teacher sees twice as many images in each step."""

    def batches() -> Iterator[CalibrationBatch]:
        for step, images in enumerate(_images(48).split(4)):
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            seen = {"fast": step * 8, "slow": step * 4}
            yield CalibrationBatch(images, {"fast": "auto", "slow": "auto"}, seen)

    def fit() -> dict[str, str]:
        ensemble = Ensemble({"fast": PatchMean(), "slow": PatchMean()}, student_patch=8)
        with listening():
            return Statistics().fit(ensemble, batches(), tmp_path, {}, 48)

    with pytest.raises(Stopped):
        fit()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["fast.safetensors"]
