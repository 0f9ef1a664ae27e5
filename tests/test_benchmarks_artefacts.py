"""Bias energy and seams of maps whose patterns are known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.benchmarks.artefacts import ArtefactsConfig
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.seams import SeamRatio
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.errors import TeacherError
from teachers.features import Features
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from tests.ranks import run_on_ranks
from tests.tiny_run import write_images


class Patterned(Pixels):
    """Mean colours and, on top, a pattern that is the same for every image."""

    def __init__(self, strength: float) -> None:
        super().__init__(PixelsConfig(patch_size=4, resolution=(32, 48)))
        self.strength = strength

    def extract(self, images: Tensor) -> Features:
        summary, maps = super().extract(images)
        generator = torch.Generator().manual_seed(0)
        pattern = torch.randn(maps.shape[1:], generator=generator)
        return Features(summary, maps + self.strength * pattern)


def measure(encoder: Teacher, folder: Path, **options: object) -> Measurement:
    if not (folder / "images").is_dir():
        write_images(folder / "images", count=6)
    entry = {"kind": "artefacts", "images": str(folder / "images"), "batch_size": 4}
    return build_benchmark(parse_benchmark({**entry, **options})).measure(encoder, 0, folder)


def test_bias_energy_is_that_of_a_slow_count(tmp_path: Path) -> None:
    from data.images import load_images

    encoder = Patterned(0.3)
    figures, protocol = measure(encoder, tmp_path)
    images, _ = load_images(tmp_path / "images", (32, 48))
    maps = encoder(images.float() / 255).spatial.double()
    bias = sum(float(channel.mean(0).var(correction=0)) for channel in maps.unbind(1))
    total = sum(float(channel.var(correction=0)) for channel in maps.unbind(1))
    assert figures == {"bias_energy": pytest.approx(bias / total, rel=1e-9)}
    assert protocol == {"images": 6, "input_px": [32, 48], "grid": [8, 12], "tiles": [1, 1]}
    assert (tmp_path / "mean_map.png").is_file()


def test_a_pattern_that_drowns_the_images_has_nearly_all_of_the_energy(tmp_path: Path) -> None:
    weak, strong = (measure(Patterned(s), tmp_path).metrics["bias_energy"] for s in (0.0, 30.0))
    assert weak < 0.5
    assert strong > 0.99


def test_maps_that_never_change_are_refused(tmp_path: Path) -> None:
    encoder = Patterned(0.0)
    encoder.mean.fill_(0)
    encoder.std.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="the maps are constant or not finite"):
        measure(encoder, tmp_path)


def test_an_upsamplers_seams_are_looked_for_where_its_tiles_meet(tmp_path: Path) -> None:
    inner = Pixels(PixelsConfig(patch_size=4, resolution=(32, 48)))
    encoder = UpsampledTeacher(
        inner, build_upsampler(parse_upsampler({"kind": "tile", "factor": 2}), inner.spec)
    )
    figures, protocol = measure(encoder, tmp_path)
    assert protocol["tiles"] == [2, 2]
    assert figures["seam_ratio"] == pytest.approx(1, abs=0.6)  # mean colours know no tiles


def test_a_map_without_an_upsampler_has_seams_where_the_entry_says(tmp_path: Path) -> None:
    encoder = Patterned(0.0)
    assert "seam_ratio" in measure(encoder, tmp_path, tiles=2).metrics
    with pytest.raises(TeacherError, match="8 x 12 cells cannot be divided into 3 x 3 equal"):
        measure(encoder, tmp_path, tiles=3)


def measured_on_ranks(folder: str) -> dict[str, float]:
    options = {"batch_size": 1, "tiles": 2}
    return measure(Patterned(0.3), Path(folder), **options).metrics


@pytest.mark.process
def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    due = measured_on_ranks(str(tmp_path))
    for came in run_on_ranks(2, measured_on_ranks, str(tmp_path)):
        assert came == pytest.approx(due, rel=1e-12)


def test_a_step_three_times_as_high_at_the_seam_has_a_ratio_of_nine() -> None:
    columns = torch.arange(12.0) + 2.0 * (torch.arange(12) >= 4) + 2.0 * (torch.arange(12) >= 8)
    seams = SeamRatio((1, 3), (1, 1))
    seams.add(columns.expand(2, 3, 5, 12))
    assert seams.value() == pytest.approx(9)


def test_no_tiles_have_no_seam_ratio() -> None:
    seams = SeamRatio((1, 1), (1, 1))
    seams.add(torch.rand(1, 2, 4, 4))
    assert seams.value() is None


def test_tiles_are_one_number_or_two() -> None:
    config = ArtefactsConfig.model_validate({"images": "x", "tiles": 2, "size": [32, 48]})
    assert (config.tiles, config.size) == ((2, 2), (32, 48))
