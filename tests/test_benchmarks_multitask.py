"""The multi-task benchmark: known optima on both layouts, losses, what a move does to truth."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.errors import DataError
from data.labelled.multitask import NyudLayout, PascalContextLayout
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.dense.class_tasks import SaliencyTask
from distill.benchmarks.dense.depth import DepthTask
from distill.benchmarks.dense.multitask import build_tasks
from distill.benchmarks.dense.normals import NormalsTask
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
from tests.ranks import run_on_ranks
from tests.test_data_labelled_multitask import save, save_parts

# Four colours that no plane holds: a linear map gives each of them whatever is wanted.
COLOURS = np.array([[250, 20, 30], [20, 240, 40], [30, 10, 230], [240, 230, 220]], np.uint8)
NORMALS = np.array([[255, 128, 128], [128, 255, 128], [128, 128, 0], [204, 51, 128]], np.uint8)
DEPTHS = np.array([0.5, 4.0, 9.0, 2.0])
PARTS = ("head", "torso", "luarm")
SIZES = ((8, 8), (6, 8), (8, 5))
SPEC = FeatureSpec(
    summary_dim=None, spatial_dim=1, patch_size=1, resolution=(8, 8), any_resolution=True
)


class Slope(Teacher):
    """Whether red rises to the right, 1, or falls, -1."""

    def __init__(self) -> None:
        super().__init__(SPEC, mean=(0, 0, 0), std=(1, 1, 1))

    def extract(self, images: Tensor) -> Features:
        red = torch.nn.functional.pad(images[:, :1], (1, 1, 0, 0), mode="replicate")
        return Features(None, (red[..., 2:] - red[..., :-2]).sign())


def classes(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each pixel, and which are unknown: there the colours are of another kind."""
    size = SIZES[number % len(SIZES)]
    unknown = np.zeros(size, bool)
    unknown[:2, :3] = True
    return rng.integers(0, 4, size), unknown


def write_nyud(root: Path, count: int = 4) -> Path:
    """Every task's truth is a matter of colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        names = [f"{split}{number}" for number in range(count)]
        for number, name in enumerate(names):
            kind, unknown = classes(number, rng)
            wrong = np.where(unknown, (kind + 1) % 4, kind)
            save(root / "images" / f"{name}.png", COLOURS[wrong])
            labels = np.where(unknown, 0, 1 + 9 * kind).astype(np.uint8)
            save(root / "segmentation" / f"{name}.png", labels)
            normals = np.where(unknown[..., None], 128, NORMALS[kind]).astype(np.uint8)
            save(root / "normals" / f"{name}.png", normals)
            (root / "depth").mkdir(exist_ok=True)
            np.save(root / "depth" / f"{name}.npy", np.where(unknown, 0, DEPTHS[kind]))
        (root / "gt_sets").mkdir(exist_ok=True)
        (root / "gt_sets" / f"{split}.txt").write_text("\n".join(names))
    return root


def write_pascal(root: Path, count: int = 4) -> Path:
    """As of `write_nyud`; saliency, which is known everywhere, follows the colours everywhere."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        names = [f"{split}{number}" for number in range(count)]
        for number, name in enumerate(names):
            kind, unknown = classes(number, rng)
            wrong = np.where(unknown, (kind + 1) % 4, kind)
            (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
            path = root / "JPEGImages" / f"{name}.jpg"
            Image.fromarray(COLOURS[wrong]).save(path, format="PNG")  # exact colours
            labels = np.where(unknown, 255, 5 * kind).astype(np.uint8)
            save(root / "semseg" / "VOC12" / f"{name}.png", labels)
            normals = np.where(unknown[..., None], 128, NORMALS[kind]).astype(np.uint8)
            save(root / "normals_distill" / f"{name}.png", normals)
            save(root / "sal_distill" / f"{name}.png", np.uint8(255) * (wrong < 2))
            parts = [(p, np.uint8(wrong == i)) for i, p in enumerate(PARTS, 1)]
            save_parts(root / "human_parts" / f"{name}.mat", (15, parts), (8, []))
        (root / "ImageSets" / "Context").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Context" / f"{split}.txt").write_text("\n".join(names))
    return root


def measure(
    kind: str, root: Path, out: Path, encoder: Teacher | None = None, **options: Any
) -> Measurement:
    probe = {"steps": 150, "batch_size": 4, "lr": [0.01, 0.1]} | options.pop("probe", {})
    seen = {"crop": [8, 8], "stride": [8, 8], "flip": False} | options.pop("input", {})
    dataset = {"kind": kind, "root": str(root)}
    entry = {"kind": "multitask", "dataset": dataset, "probe": probe, "input": seen}
    out.mkdir(parents=True, exist_ok=True)
    benchmark = build_benchmark(parse_benchmark(entry | options))
    return benchmark.measure(encoder or pixels(), 0, out)


def pixels() -> Pixels:
    return Pixels(PixelsConfig(patch_size=1, resolution=(8, 8)))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["online", "cached"])
def test_every_task_of_nyud_reaches_its_optimum_and_unknown_pixels_do_not_count(
    tmp_path: Path, mode: str
) -> None:
    """Unknown pixels have colours of another kind: they would spoil training and figures."""
    root = write_nyud(tmp_path / "set")
    figures, protocol = measure("nyud", root, tmp_path / "out", probe={"mode": mode})
    assert list(figures) == [
        *("semseg_miou", "semseg_miou_absent_as_0", "normals_mean_angle_pooled"),
        "depth_rmse_pooled",
    ]
    assert figures["semseg_miou"] == 100
    assert figures["semseg_miou_absent_as_0"] == pytest.approx(100 * 4 / 40)
    assert figures["normals_mean_angle_pooled"] < 1.5
    assert figures["depth_rmse_pooled"] < 0.1
    known = sum(h * w - 6 for h, w in (*SIZES, SIZES[0]))
    assert protocol["counted_pixels"] == dict.fromkeys(("semseg", "normals", "depth"), known)
    assert (protocol["train_images"], protocol["test_images"]) == (4, 4)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("figures.json", "predictions.png", "probe.safetensors")
    }


@pytest.mark.long
def test_every_task_of_pascal_context_reaches_its_optimum(tmp_path: Path) -> None:
    root = write_pascal(tmp_path / "set")
    figures, protocol = measure("pascal_context", root, tmp_path / "out", loss_stride=2)
    angle = figures.pop("normals_mean_angle_pooled")
    assert angle < 1.5
    assert figures == {
        "semseg_miou": 100,
        "semseg_miou_absent_as_0": pytest.approx(100 * 4 / 21),
        "parts_miou": 100,
        "parts_miou_absent_as_0": pytest.approx(100 * 4 / 7),
        "saliency_max_f": pytest.approx(100),
    }
    all_pixels = sum(h * w for h, w in (*SIZES, SIZES[0]))
    counted = protocol["counted_pixels"]
    assert (counted["saliency"], counted["semseg"]) == (all_pixels, all_pixels - 4 * 6)


def test_each_task_takes_the_rate_that_is_best_for_it(tmp_path: Path) -> None:
    """Directions want small steps, metres large ones."""
    root = write_nyud(tmp_path / "set")
    figures, _ = measure("nyud", root, tmp_path / "out", probe={"steps": 60})
    by_rate = json.loads((tmp_path / "out/figures.json").read_text())
    small, large = by_rate["0.01"], by_rate["0.1"]
    angle, rmse = "mean_angle_pooled", "rmse_pooled"
    assert figures[f"normals_{angle}"] == small["normals"][angle] < large["normals"][angle]
    assert figures[f"depth_{rmse}"] == large["depth"][rmse] < small["depth"][rmse]
    state = load_file(tmp_path / "out/probe.safetensors")
    assert {name.split(".")[1] for name in state} == {"semseg", "normals", "depth"}


def augmented(root: str, out: str) -> tuple[dict[str, float], dict[str, Any]]:
    """An uneven number of images, moved and recoloured, and windows that overlap."""
    options = {"crop": [6, 6], "stride": [4, 4], "scale": [0.75, 1.5], "photometric": True}
    probe = {"steps": 4, "batch_size": 3, "lr": 0.01}
    options["flip"] = True
    return measure("pascal_context", Path(root), Path(out), Slope(), probe=probe, input=options)


@pytest.mark.process
def test_two_ranks_count_what_one_counts(tmp_path: Path) -> None:
    root = write_pascal(tmp_path / "set", 3)
    alone = augmented(str(root), str(tmp_path / "one"))
    first, second = run_on_ranks(2, augmented, str(root), str(tmp_path / "two"))
    assert first == second == alone
    assert 0 < alone[0]["semseg_miou"] < 100


def write_ramps(root: Path) -> Path:
    """Images to train on grow brighter to the right and face there; to test, the other way."""
    ramp = np.broadcast_to(np.linspace(0, 250, 8).astype(np.uint8)[:, None], (8, 8, 3))
    for split, way, right in (("train", 1, 204), ("val", -1, 51)):
        save(root / "images" / f"{split}.png", np.ascontiguousarray(ramp[:, ::way]))
        save(root / "segmentation" / f"{split}.png", np.ones((8, 8), np.uint8))
        save(root / "normals" / f"{split}.png", np.full((8, 8, 3), (right, 128, 51), np.uint8))
        (root / "depth").mkdir(exist_ok=True)
        np.save(root / "depth" / f"{split}.npy", np.full((8, 8), 4.0))
        (root / "gt_sets").mkdir(exist_ok=True)
        (root / "gt_sets" / f"{split}.txt").write_text(split)
    return root


@pytest.mark.long
def test_a_mirrored_image_has_mirrored_normals(tmp_path: Path) -> None:
    """What faces left is seen in mirrored images only, and learned from their normals only."""
    root = write_ramps(tmp_path / "set")
    probe = {"steps": 60, "batch_size": 16}
    angles = [
        measure(
            "nyud", root, tmp_path / f"{flip}", Slope(), input={"flip": flip}, probe=probe
        ).metrics["normals_mean_angle_pooled"]
        for flip in (True, False)
    ]
    assert angles[0] < 10  # batches differ in how many are mirrored, which the batch norm sees
    assert angles[1] > 60


@pytest.mark.long
def test_an_enlarged_image_is_nearer(tmp_path: Path) -> None:
    """Of 4 m, seen at twice the size, 2 m are learned: and 2 m is how far off that is here."""
    root = write_ramps(tmp_path / "set")
    options = {"scale": [2, 2]}
    probe = {"steps": 100, "lr": 0.1}
    figures, _ = measure("nyud", root, tmp_path / "out", input=options, probe=probe)
    assert abs(figures["depth_rmse_pooled"] - 2) < 0.2


def test_a_mirror_leaves_unknown_normals_unknown() -> None:
    truth = torch.tensor([[0.6, 0], [0, 0], [-0.8, 0]]).view(3, 1, 2)
    task = NormalsTask("normals", 3)
    due = torch.tensor([[-0.6, 0], [0, 0], [-0.8, 0]]).view(3, 1, 2)
    assert torch.equal(task.adapt(truth, 2.0, True), due)
    assert task.known(due).tolist() == [[True, False]]
    assert torch.equal(task.adapt(truth, 2.0, False), truth)


def test_saliency_is_balanced_and_unknown_pixels_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 3, 5, generator=generator)
    truth = (torch.rand(2, 1, 3, 5, generator=generator) < 0.3).float()
    truth[0, 0, 0] = 255
    pairs = [
        (1 / (1 + math.exp(-x)), t)
        for x, t in zip(logits.flatten().tolist(), truth.flatten().tolist(), strict=True)
        if t != 255
    ]
    salient = sum(t for _, t in pairs) / len(pairs)
    assert 0 < salient < 0.5
    slow = [-(1 - salient) * math.log(p) if t else -salient * math.log(1 - p) for p, t in pairs]
    came = SaliencyTask("saliency").loss(logits, truth, 0)
    assert came.item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)


def test_l1_is_of_components_and_of_metres_where_they_are_known() -> None:
    predicted = torch.tensor([[0.6, 7], [0, 7], [-0.8, 7]]).view(1, 3, 1, 2)
    truth = torch.tensor([[1.0, 0], [0, 0], [0, 0]]).view(1, 3, 1, 2)
    normals = NormalsTask("normals", 3).loss(predicted, truth, 0)
    assert normals.item() == pytest.approx((0.4 + 0 + 0.8) / 3)
    metres = torch.tensor([2.0, 5, 9]).view(1, 1, 1, 3)
    known = torch.tensor([3.0, 3, 0]).view(1, 1, 1, 3)
    assert DepthTask("depth").loss(metres, known, 0).item() == pytest.approx(1.5)


def test_a_batch_without_truth_has_no_loss_and_no_slope() -> None:
    for layout in (
        PascalContextLayout(kind="pascal_context", root=Path()),
        NyudLayout(kind="nyud", root=Path()),
    ):
        for task in build_tasks(layout):
            predicted = torch.randn(2, task.outputs, 3, 3).requires_grad_()
            unknown = torch.full((2, task.channels, 3, 3), float(task.unknown))
            loss = task.loss(predicted, unknown, 0)
            (slope,) = torch.autograd.grad(loss, predicted)
            assert loss == 0
            assert not slope.any()


def test_weights_are_the_published_ones() -> None:
    weights = {
        task.name: task.weight
        for layout in (
            PascalContextLayout(kind="pascal_context", root=Path()),
            NyudLayout(kind="nyud", root=Path()),
        )
        for task in build_tasks(layout)
    }
    assert weights == {"semseg": 1, "parts": 2, "saliency": 5, "normals": 10, "depth": 1}


def test_a_set_without_truth_of_a_task_is_refused(tmp_path: Path) -> None:
    root = write_pascal(tmp_path / "set", 1)
    (root / "human_parts" / "val0.mat").unlink()
    with pytest.raises(
        DataError, match="none of 1 images that are counted has a known pixel of parts"
    ):
        measure("pascal_context", root, tmp_path / "out", probe={"steps": 1})


def test_a_missing_set_is_shown_with_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gt_sets/train.txt; expected under(.|\n)*depth/\*.npy"):
        measure("nyud", tmp_path / "none", tmp_path / "out")


def test_images_of_several_sizes_need_a_crop(tmp_path: Path) -> None:
    root = write_nyud(tmp_path / "set")
    with pytest.raises(DataError, match=r"set input.size or input.crop to bring all to one size"):
        measure("nyud", root, tmp_path / "out", input={"crop": None, "stride": None})
