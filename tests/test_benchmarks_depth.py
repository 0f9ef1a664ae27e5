"""Depth benchmark: the loss, the bins, the way from an image to counted pixels, whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.errors import DataError
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.dense.depth import BinnedDepth, Depth, gradient_loss
from distill.benchmarks.dense.geometry import GeometryImages
from distill.benchmarks.dense.pixel_task import TaskGroup
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from tests.doubles import Denormalising, MeanColours
from tests.ranks import run_on_ranks

COUNT, HEIGHT, WIDTH = 6, 24, 32


def colours() -> MeanColours:
    return MeanColours(4, (HEIGHT, WIDTH), any_resolution=True)


def pixels(patch: int = 4) -> Pixels:
    return Pixels(PixelsConfig(patch_size=patch, resolution=(HEIGHT, WIDTH)))


def write(root: Path) -> Path:
    """Images whose red channel says the depth: 1 m and a metre more for each fifth of red."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(COUNT):
            coarse = generator.integers(0, 255, (6, 8, 3)).astype(np.uint8)
            image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
            for kind in ("rgb", "depth"):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            image.save(root / split / "rgb" / f"{number}.png")
            red = np.asarray(image)[..., 0]
            depth = (1000 + red / 51 * 1000).astype(np.uint16)
            depth[:2, :3] = 0
            Image.fromarray(depth).save(root / split / "depth" / f"{number}.png")
    return root


def entry(root: Path, **changes: Any) -> dict[str, Any]:
    probe = {"steps": 60, "batch_size": 3, "lr": 0.03} | changes.pop("probe", {})
    return {
        "kind": "depth",
        "dataset": {"kind": "folder", "root": str(root)},
        "probe": probe,
        "head": {"kind": "linear"},
        "bins": 16,
    } | changes


def benchmark(root: Path, **changes: Any) -> Depth:
    built = build_benchmark(parse_benchmark(entry(root, **changes)))
    assert isinstance(built, Depth)
    return built


def images(chosen: Depth, encoder: Teacher | None = None) -> GeometryImages:
    return GeometryImages(encoder or pixels(), TaskGroup(chosen.tasks()), chosen)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("depth"))


def ramp(height: int, width: int, axis: int) -> Tensor:
    length = (height, width)[axis]
    along = (torch.arange(length) + 0.5) / length
    shape = (-1, 1) if axis == 0 else (1, -1)
    return along.view(shape).expand(height, width).expand(3, height, width)


@pytest.mark.parametrize("flip_average", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "height, width, size",
    [(24, 32, (24, 32)), (21, 27, (21, 27)), (24, 32, (48, 64)), (24, 32, (12, 16))],
)
def test_a_linear_ramp_survives_encoding_the_probe_and_enlarging(
    root: Path, height: int, width: int, size: tuple[int, int], axis: int, flip_average: bool
) -> None:
    """Half-pixel centres throughout; padding is cut off before anything is resized."""
    chosen = benchmark(root, flip_average=flip_average, depth_range=(0.001, 2))
    came = images(chosen).predict([Denormalising(1)], ramp(height, width, axis), size)[0][0]
    due = ramp(*size, axis)[0]
    scale = size[axis] / (height, width)[axis]
    rim = round(8 * scale)  # where cells are clamped, or hold padding
    inner: list[slice] = [slice(None), slice(None)]
    inner[axis] = slice(rim, -rim)
    assert torch.allclose(came[tuple(inner)], due[tuple(inner)], atol=1e-5)


def test_images_are_resized_for_encoders_of_one_size(root: Path) -> None:
    seen = images(benchmark(root, input={"size": "native"}, depth_range=(0.001, 2)))
    came = seen.predict([Denormalising(1)], ramp(2 * HEIGHT, 2 * WIDTH, 1), (HEIGHT, WIDTH))[0][0]
    due = ramp(HEIGHT, WIDTH, 1)[0]
    assert seen.input_size == (HEIGHT, WIDTH)
    assert torch.allclose(came[:, 8:-8], due[:, 8:-8], atol=1e-5)


def test_flip_averaging_is_the_mean_of_an_image_and_its_mirror_image(root: Path) -> None:
    class Lopsided(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            weight = torch.linspace(1, 2, maps.shape[-1])
            return (maps[:, :1] * 0.25 + 0.5) * weight

    image = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    single, both = (images(benchmark(root, flip_average=flip)) for flip in (False, True))
    size = (HEIGHT, WIDTH)
    (one,) = single.predict([Lopsided()], image, size)
    other = single.predict([Lopsided()], image.flip(-1), size)[0].flip(-1)
    (came,) = both.predict([Lopsided()], image, size)
    assert torch.allclose(came, (one + other) / 2, atol=1e-6)


def test_bins_are_uniform_and_weighted_by_relu_and_a_tenth() -> None:
    logits = torch.tensor([3.0, -1.0, 0.0, 0.5]).view(1, 4, 1, 1)
    came = BinnedDepth(nn.Identity(), 4, (1.0, 10.0))(logits)
    weights = [3.1, 0.1, 0.1, 0.6]
    due = sum(w * c for w, c in zip(weights, (1, 4, 7, 10), strict=True)) / sum(weights)
    assert came.shape == (1, 1, 1, 1)
    assert float(came) == pytest.approx(due, rel=1e-6)


def test_the_term_of_gradients_is_added_by_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, truth = torch.rand(2, 2, 1, 9, 7, generator=generator).add(0.5)
    plain, weighted = (benchmark(Path(), gradient_weight=weight).tasks()[0] for weight in (0, 0.05))
    due = 0.05 * gradient_loss(prediction, truth, truth > 0)
    for step in (0, 100):
        more = weighted.loss(prediction, truth, step) - plain.loss(prediction, truth, step)
        assert float(more) == pytest.approx(float(due), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["online", "cached"])
@pytest.mark.parametrize("head", [{"kind": "linear"}, {"kind": "dpt", "hidden_dim": 8}])
def test_a_probe_beats_the_mean_map_where_colours_say_the_depth(
    tmp_path: Path, mode: str, head: dict[str, Any]
) -> None:
    chosen = benchmark(write(tmp_path), probe={"mode": mode, "steps": 150}, head=head)
    figures, protocol = chosen.measure(colours(), 0, tmp_path)
    assert next(iter(figures)) == "rmse_per_image"
    assert figures["rmse_per_image"] < 0.7 * figures["mean_map_rmse_per_image"]
    everything = json.loads((tmp_path / "figures.json").read_text())
    assert everything.keys() == {"mean map", "lr 0.03"}
    assert figures["d1_per_image"] > everything["mean map"]["d1_per_image"]
    assert (protocol["train_images"], protocol["test_images"]) == (COUNT, COUNT)
    assert protocol["test_images_without_truth"] == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"probe.safetensors", "predictions.png"}


def test_an_encoder_without_layers_has_no_dpt(tmp_path: Path) -> None:
    chosen = benchmark(write(tmp_path), head={"kind": "dpt"})
    with pytest.raises(TeacherError, match="Pixels returns its last map only.*linear"):
        chosen.measure(pixels(), 0, tmp_path)


def test_the_best_of_several_rates_counts_and_all_are_told(tmp_path: Path) -> None:
    chosen = benchmark(write(tmp_path), probe={"lr": (1e-6, 0.03)})
    figures = chosen.measure(pixels(), 0, tmp_path).metrics
    by_rate = json.loads((tmp_path / "figures.json").read_text())
    low, high = (by_rate[f"lr {rate}"]["rmse_per_image"] for rate in ("1e-06", "0.03"))
    assert figures["rmse_per_image"] == high < low


def measured_on_rank(root: Path) -> dict[str, float]:
    (root / "out").mkdir(exist_ok=True)
    return benchmark(root, probe={"steps": 8}).measure(pixels(), 0, root / "out").metrics


@pytest.mark.process
def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    write(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "rgb" / "5.png").unlink()  # five images for two ranks
    alone = measured_on_rank(tmp_path)
    for figures in run_on_ranks(2, measured_on_rank, tmp_path):
        assert figures == pytest.approx(alone, rel=1e-5)


def test_the_mean_map_is_the_mean_of_what_is_known_at_each_place(tmp_path: Path) -> None:
    chosen = benchmark(write(tmp_path))
    maps = torch.stack([chosen.read(s).labels for s in chosen.config.dataset.samples("train")])
    came = chosen.constants()["mean map"]
    assert torch.allclose(came[:, 5:], maps.mean(0)[:, 5:])
    assert torch.allclose(came[0, 0, 0], maps[maps > 0].mean())  # known in no image


def test_only_what_counts_is_counted(tmp_path: Path) -> None:
    chosen = benchmark(write(tmp_path), counted={"rows": (3, 9), "columns": (4, 20)})
    sample = chosen.config.dataset.samples("test")[0]
    image, truth = images(chosen).test(sample)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert (truth > 0).sum() == 6 * 16
    assert (truth[0, 3:9, 4:20] > 0).all()
    coarse = images(benchmark(tmp_path, labels=(6, 8))).test(sample).labels
    assert coarse.shape == (1, 6, 8)


def test_the_grid_that_is_counted_on_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    for changes, named in (({}, "as stored"), ({"labels": (6, 8)}, [6, 8])):
        chosen = benchmark(tmp_path, probe={"steps": 1}, **changes)
        assert chosen.measure(pixels(), 0, tmp_path).protocol["metric_grid"] == named


def test_depth_outside_of_the_range_is_unknown(tmp_path: Path) -> None:
    chosen = benchmark(write(tmp_path), depth_range=(2.0, 4.0))
    truth = chosen.read(chosen.config.dataset.samples("test")[0]).labels
    assert truth[truth > 0].min() >= 2
    assert truth.max() <= 4
    decoded = chosen.tasks()[0].decode(torch.tensor([[[[1.0, 3.0, 9.0]]]]))
    assert decoded.flatten().tolist() == [2, 3, 4]


def test_training_images_are_cut_and_mirrored_with_their_depth(tmp_path: Path) -> None:
    window = {"rows": (2, 22), "columns": (3, 31)}
    views = images(benchmark(write(tmp_path), input={"window": window, "crop": (8, 12)}))
    whole, _ = views.view(0, None)
    assert whole.shape == (3, 20, 28)
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        image, truth = views.view(0, generator)
        assert image.shape == (3, 8, 12)
        # Red tells the depth, wherever both went.
        assert torch.allclose(truth[0], 1 + image[0] * 5, atol=2e-3)
        seen.add(round(float(image.sum()), 4))
    assert len(seen) > 15


def test_a_crop_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    chosen = benchmark(write(tmp_path), input={"crop": (30, 12)})
    with pytest.raises(DataError, match=r"input.crop: \[30, 12\] of '0', \(24, 32\) px"):
        images(chosen).view(0, torch.Generator().manual_seed(0))


def test_images_of_several_sizes_are_refused_with_a_cure(tmp_path: Path) -> None:
    write(tmp_path)
    for kind in ("rgb", "depth"):
        path = tmp_path / "train" / kind / "3.png"
        Image.open(path).crop((0, 0, 16, 16)).save(path)
    with pytest.raises(DataError, match=r"'3' is \(16, 16\) px, the first image \(24, 32\); set"):
        benchmark(tmp_path).measure(pixels(), 0, tmp_path)


def test_a_range_that_does_not_rise_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"depth_range: \[4.0, 2.0\] does not rise"):
        benchmark(Path(), depth_range=(4.0, 2.0))
