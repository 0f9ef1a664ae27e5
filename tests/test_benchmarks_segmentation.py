"""The segmentation benchmark: known optima, windows, metrics, augmentation, and ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.dense.confusion import class_ious, confusion_matrix, segmentation_scores
from distill.benchmarks.dense.heads import LinearHead
from distill.benchmarks.dense.pixel_inference import predict
from distill.benchmarks.dense.pixel_samples import (
    InputConfig,
    LabelledPixels,
    ResolvedInput,
    augmented,
    input_size,
    padded,
    photometric,
    resized,
    windows,
)
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.errors import TeacherError
from tests.doubles import SPEC, Curved, Denormalising
from tests.ranks import run_on_ranks

COLOURS = np.array([[250, 20, 30], [20, 240, 40], [30, 10, 230]], np.uint8)


def seen(**options: Any) -> ResolvedInput:
    return InputConfig.model_validate(options).resolved(SPEC)


def write_set(root: Path, counts: tuple[int, int] = (4, 3), noise: int = 0, side: int = 8) -> None:
    """Images whose colours are their classes, but for noise; a corner is ignored."""
    rng = np.random.default_rng(0)
    for part, count in zip(("training", "validation"), counts, strict=True):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            labels = rng.integers(0, 3, (side, side)).astype(np.uint8)
            moved = rng.integers(-noise, noise + 1, (side, side, 3))
            image = (COLOURS[labels].astype(int) + moved).clip(0, 255).astype(np.uint8)
            labels[0, 0] = 255
            Image.fromarray(image).save(root / f"images/{part}/{number}.png")
            Image.fromarray(labels).save(root / f"annotations/{part}/{number}.png")


def measure(
    root: Path, out: Path, encoder: Any = None, seed: int = 0, **options: Any
) -> Measurement:
    entry: dict[str, Any] = {
        "kind": "segmentation",
        "dataset": {"kind": "folder", "root": str(root), "classes": ["r", "g", "b"]},
        "probe": {"steps": 60, "batch_size": 4, "lr": 0.05},
    }
    benchmark = build_benchmark(parse_benchmark(entry | options))
    out.mkdir(parents=True, exist_ok=True)
    return benchmark.measure(encoder or pixels(), seed, out)


def pixels(patch: int = 1) -> Pixels:
    return Pixels(PixelsConfig(patch_size=patch, resolution=(8, 8)))


@pytest.mark.parametrize("mode", ["online", "cached"])
def test_classes_that_are_linearly_separable_reach_100(tmp_path: Path, mode: str) -> None:
    write_set(tmp_path / "set")
    probe = {"steps": 60, "batch_size": 4, "lr": 0.05, "mode": mode}
    figures, protocol = measure(tmp_path / "set", tmp_path / "out", probe=probe)
    assert figures == {"miou": 100.0, "pixel_accuracy": 100.0, "mean_accuracy": 100.0}
    assert (protocol["train_images"], protocol["test_images"]) == (4, 3)
    assert protocol["metric_grid"] == "as labelled"
    assert json.loads((tmp_path / "out/iou.json").read_text()) == {"r": 100, "g": 100, "b": 100}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("iou.json", "miou_by_lr.json", "predictions.png", "probe.safetensors")
    }


@pytest.mark.long
def test_the_probe_reaches_the_optimum_of_logistic_regression(tmp_path: Path) -> None:
    """scikit-learn's, without a penalty, on the same pixels of noisy colours."""
    from sklearn.linear_model import LogisticRegression

    from data.labelled.segmentation_files import FolderSegmentation

    write_set(tmp_path / "set", counts=(6, 6), noise=200)
    dataset = FolderSegmentation(kind="folder", root=tmp_path / "set", classes=("r", "g", "b"))
    arrays = {}
    for split in ("train", "test"):
        read = [dataset.read(sample) for sample in dataset.samples(split)]  # type: ignore[arg-type]
        x, y = (np.concatenate([r[i].reshape(64, -1) for r in read]) for i in (0, 1))
        kept = y[:, 0] != 255
        arrays[split] = x[kept] / 255.0, y[kept, 0]
    best = LogisticRegression(C=1e6, max_iter=2000).fit(*arrays["train"])
    accuracy = 100 * best.score(*arrays["test"])
    assert 60 < accuracy < 95
    probe = {"steps": 400, "batch_size": 6, "lr": 0.05, "mode": "cached"}
    inputs = {"flip": False}
    figures, _ = measure(tmp_path / "set", tmp_path / "out", probe=probe, input=inputs)
    assert abs(figures["pixel_accuracy"] - accuracy) < 1


def test_of_several_rates_the_best_counts_and_all_are_named(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    probe = {"steps": 30, "batch_size": 4, "lr": [1e-6, 0.05], "mode": "cached"}
    figures, _ = measure(tmp_path / "set", tmp_path / "out", probe=probe)
    by_rate = json.loads((tmp_path / "out/miou_by_lr.json").read_text())
    assert figures["miou"] == by_rate["0.05"] > by_rate["1e-06"]


def cropped(root: str, out: str) -> dict[str, float]:
    """An uneven number of images and windows, with augmentation."""
    figures, _ = measure(
        Path(root),
        Path(out),
        probe={"steps": 4, "batch_size": 3, "lr": 0.01},
        input={"crop": [6, 6], "stride": [4, 4], "scale": [0.75, 1.5], "photometric": True},
    )
    return figures


@pytest.mark.process
def test_two_ranks_count_what_one_counts(tmp_path: Path) -> None:
    write_set(tmp_path / "set", noise=200)
    alone = cropped(str(tmp_path / "set"), str(tmp_path / "one"))
    first, second = run_on_ranks(2, cropped, str(tmp_path / "set"), str(tmp_path / "two"))
    assert first == second == alone
    one, two = ((tmp_path / name / "iou.json").read_text() for name in ("one", "two"))
    assert one == two
    assert 0 < alone["miou"] < 100


def test_another_seed_gives_another_probe(tmp_path: Path) -> None:
    write_set(tmp_path / "set", noise=200)
    probe = {"steps": 3, "batch_size": 2, "lr": 0.01}
    one, same, other = (
        measure(tmp_path / "set", tmp_path / f"{i}", seed=seed, probe=probe).metrics
        for i, seed in enumerate((0, 0, 1))
    )
    assert one == same != other


def test_cached_windows_are_all_trained_on(tmp_path: Path) -> None:
    """Nine windows of an image; what fits the corner window alone has been seen."""
    write_set(tmp_path / "set")
    probe = {"steps": 60, "batch_size": 4, "lr": 0.05, "mode": "cached"}
    cropped = {"crop": [4, 4], "stride": [2, 2]}
    figures, _ = measure(tmp_path / "set", tmp_path / "out", probe=probe, input=cropped)
    assert figures["miou"] == 100


def test_the_encoder_is_not_trained(tmp_path: Path) -> None:
    write_set(tmp_path / "set", side=16)
    encoder = Curved()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    options = {"size": "native"}
    _, protocol = measure(tmp_path / "set", tmp_path / "out", encoder.train(), input=options)
    assert protocol["input"]["size"] == [12, 20]
    assert not encoder.training
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_an_encoder_of_one_size_is_refused_with_what_to_set(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with pytest.raises(TeacherError, match=r"input.size=\[12,20\], or slide windows"):
        measure(tmp_path / "set", tmp_path / "out", Curved())


def test_images_of_several_sizes_need_a_size_or_a_crop(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for folder in ("images", "annotations"):
        path = tmp_path / f"set/{folder}/training/1.png"
        Image.open(path).resize((9, 10), Image.Resampling.NEAREST).save(path)
    with pytest.raises(DataError, match=r"'1' is \(10, 9\) px, the first image \(8, 8\)"):
        measure(tmp_path / "set", tmp_path / "out")
    measure(tmp_path / "set", tmp_path / "out", input={"crop": [8, 8]})


@pytest.mark.parametrize(
    "size, crop, stride",
    [((10, 13), (4, 5), (3, 4)), ((8, 8), (8, 8), (3, 3)), ((9, 16), (8, 8), (8, 8))],
)
def test_windows_cover_every_pixel_and_are_whole(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> None:
    counts = torch.zeros(size)
    for top, left in windows(size, crop, stride):
        window = counts[top : top + crop[0], left : left + crop[1]]
        assert window.shape == crop
        window += 1
    assert counts.min() >= 1
    if size == crop:
        assert counts.max() == 1


def head_of(dim: int) -> LinearHead:
    torch.manual_seed(0)
    head = LinearHead(dim, 3).eval()
    torch.nn.init.normal_(head.project.weight)
    return head


def test_whole_and_slide_agree_where_the_image_is_one_window() -> None:
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    whole = predict(pixels(4), [head_of(3)], image, seen(), (8, 12), 2)[0].softmax(0)
    one = seen(crop=[8, 12], stride=[8, 12])
    slid = predict(pixels(4), [head_of(3)], image, one, (8, 12), 2)[0]
    assert torch.allclose(whole, slid, atol=1e-6)


@pytest.mark.parametrize("size", [(21, 27), (42, 54), (7, 9)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_linear_ramp_survives_up_to_the_grid_that_is_counted(
    size: tuple[int, int], axis: int
) -> None:
    """Half-pixel centres throughout; what covers padding is cut off before anything is resized."""

    def ramp(height: int, width: int) -> Tensor:
        along = (torch.arange((height, width)[axis]) + 0.5) / (height, width)[axis]
        return along.view((-1, 1) if axis == 0 else (1, -1)).expand(3, height, width)

    (came,) = predict(pixels(4), [Denormalising(3)], ramp(21, 27), seen(), size, 1)
    inner: list[slice] = [slice(None)] * 3
    rim = -(-8 * size[axis] // (21, 27)[axis])  # cells are clamped there, or hold padding
    inner[1 + axis] = slice(rim, -rim)
    assert came[tuple(inner)].numel()
    assert torch.allclose(came[tuple(inner)], ramp(*size)[tuple(inner)], atol=1e-5)


def test_sliding_averages_the_probabilities_of_all_windows_over_a_pixel() -> None:
    image = torch.rand(3, 10, 7, generator=torch.Generator().manual_seed(0))
    head, encoder = head_of(3), pixels(2)
    options = seen(crop=[4, 4], stride=[3, 2])
    came = predict(encoder, [head], image, options, (10, 7), 3)[0]
    sums, counts = torch.zeros(3, 10, 7), torch.zeros(10, 7)
    for top in (0, 3, 6):
        for left in (0, 2, 3):
            window = image[None, :, top : top + 4, left : left + 4]
            logits = head(encoder(window).spatial)
            dense = torch.nn.functional.interpolate(logits, (4, 4), mode="bilinear").softmax(1)[0]
            sums[:, top : top + 4, left : left + 4] += dense
            counts[top : top + 4, left : left + 4] += 1
    assert torch.allclose(came, sums / counts, atol=1e-6)


def test_an_image_smaller_than_a_window_is_padded_and_cut_again() -> None:
    image = torch.rand(3, 3, 9, generator=torch.Generator().manual_seed(0))
    options = seen(crop=[4, 4], stride=[4, 4])
    (came,) = predict(pixels(2), [head_of(3)], image, options, (3, 9), 3)
    assert came.shape == (3, 3, 9)
    assert torch.isfinite(came).all()


def slow_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if t != 255:
            matrix[t, p] += 1
    return matrix


def test_scores_equal_a_slow_count_and_torchmetrics_with_an_absent_class() -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 4, (9, 11), generator=generator)
    labels = torch.randint(0, 4, (9, 11), generator=generator)
    labels[2:4] = 255
    labels[labels == 3] = 2  # predicted, never right
    classes = 6  # 4 and 5 neither occur nor are predicted
    matrix = confusion_matrix(predicted, labels.to(torch.uint8), classes)
    assert torch.equal(matrix, slow_counts(predicted, labels, classes))
    ious = []
    for k in range(classes):
        kept = labels != 255
        both = ((predicted == k) & (labels == k) & kept).sum()
        union = (((predicted == k) | (labels == k)) & kept).sum()
        ious.append(None if union == 0 else 100 * float(both) / float(union))
    assert class_ious(matrix) == pytest.approx(ious)
    assert ious[3] == 0
    assert ious[4] is None
    metric = MulticlassJaccardIndex(classes, ignore_index=255)
    scores = segmentation_scores(matrix)
    assert abs(scores["miou"] - 100 * float(metric(predicted, labels))) < 1e-4
    right = ((predicted == labels) & (labels != 255)).sum() / (labels != 255).sum()
    assert abs(scores["pixel_accuracy"] - 100 * float(right)) < 1e-4
    recalls = [float((predicted[labels == k] == k).double().mean()) for k in (0, 1, 2)]
    assert scores["mean_accuracy"] == pytest.approx(100 * sum(recalls) / 3)


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="counts no labelled pixel"):
        segmentation_scores(torch.zeros(3, 3, dtype=torch.int64))


def coded(height: int = 12, width: int = 16) -> LabelledPixels:
    """An image that tells its labels: red is the label over 100."""
    labels = torch.randint(0, 100, (1, height, width), generator=torch.Generator().manual_seed(3))
    image = (labels / 100).expand(3, height, width).clone()
    return LabelledPixels(image, labels.to(torch.uint8))


def test_labels_move_with_their_pixels() -> None:
    options = seen(crop=[5, 6], scale=[1, 1])
    for number in range(20):
        out = augmented(coded(), options, torch.Generator().manual_seed(number))
        assert out.labels.shape == (1, 5, 6)
        assert torch.allclose(out.image[0] * 100, out.labels.float(), atol=1e-4)


def test_labels_move_with_their_pixels_under_scale() -> None:
    """Blocks of one label: inside them, resizing changes neither."""
    labels = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    labels = labels.repeat_interleave(20, 1).repeat_interleave(20, 2)
    whole = LabelledPixels((labels / 4).expand(3, 40, 40).clone(), labels)
    options = seen(crop=[24, 24], scale=[0.5, 2])
    for number in range(20):
        out = augmented(whole, options, torch.Generator().manual_seed(number))
        agrees = (out.image[0] * 4 - out.labels.float()).abs() < 0.6
        assert (agrees | (out.labels == 255)).float().mean() > 0.95


def test_the_same_generator_gives_the_same_sample() -> None:
    options = seen(crop=[5, 6], scale=[0.5, 2], photometric=True)
    one, same = (augmented(coded(), options, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.image, same.image)
    assert torch.equal(one.labels, same.labels)


def test_half_of_the_images_are_flipped() -> None:
    flipped = sum(
        not torch.equal(
            augmented(coded(), seen(), torch.Generator().manual_seed(i)).labels, coded().labels
        )
        for i in range(100)
    )
    assert 35 < flipped < 65
    kept = augmented(coded(), seen(flip=False), torch.Generator().manual_seed(0))
    assert torch.equal(kept.labels, coded().labels)


def test_crops_of_one_class_are_tried_again() -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.uint8)
    labels[..., 30:] = 1
    whole = LabelledPixels(torch.zeros(3, 40, 40), labels)
    options = seen(crop=[10, 10])
    mixed = sum(
        len(augmented(whole, options, torch.Generator().manual_seed(i)).labels.unique()) > 1
        for i in range(60)
    )
    assert mixed > 40  # of uniform crops, 9 of 31 lefts would be


def test_padding_is_black_and_ignored() -> None:
    out = padded(coded(3, 4), (5, 4))
    assert out.labels.shape == (1, 5, 4)
    assert (out.labels[:, 3:] == 255).all()
    assert (out.image[:, 3:] == 0).all()
    assert padded(coded(3, 4), (2, 2)).labels.shape == (1, 3, 4)


def test_colours_change_within_bounds_and_all_of_them() -> None:
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = [photometric(image, torch.Generator().manual_seed(i)) for i in range(40)]
    assert all(o.min() >= 0 and o.max() <= 1 for o in out)
    assert sum(torch.equal(o, image) for o in out) < 8  # one in sixteen is left alone
    grey = torch.full((3, 4, 4), 0.5)
    levels = [float(photometric(grey, torch.Generator().manual_seed(i)).mean()) for i in range(60)]
    assert max(levels) > 0.55
    assert min(levels) < 0.45


def test_labels_take_the_nearest_value_and_images_antialias() -> None:
    checks = torch.tensor([[[0, 9], [9, 0]]], dtype=torch.uint8).repeat(1, 4, 4)
    out = resized(LabelledPixels((checks / 9).expand(3, 8, 8).clone(), checks), (4, 4))
    assert set(out.labels.unique().tolist()) <= {0, 9}
    assert torch.allclose(out.image, torch.full((3, 4, 4), 0.5), atol=0.13)


def test_the_shorter_side_decides_where_the_aspect_is_kept() -> None:
    assert input_size(seen(short_side=6), 12, 20) == (6, 10)
    assert input_size(seen(short_side=6), 20, 12) == (10, 6)
    assert input_size(seen(size="native"), 7, 7) == (12, 20)
    assert input_size(seen(), 7, 9) == (7, 9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 8, "short_side": 8}, "size and short_side: set only one of them"),
        ({"stride": 4}, "stride: needs crop"),
        (
            {"crop": [8, 6], "stride": [8, 7]},
            r"stride: expected at most crop, \[8, 6\], got \[8, 7\]: no window would cover",
        ),
        ({"scale": [0.5, 2]}, "scale: needs crop"),
        (
            {"crop": 8, "scale": [2, 0.5]},
            r"scale: expected \[smallest, largest\], got \[2",
        ),
    ],
)
def test_inputs_that_contradict_themselves_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        InputConfig.model_validate(options)


def test_a_stride_above_a_native_crop_is_refused_when_the_encoder_is_known() -> None:
    config = InputConfig.model_validate({"crop": "native", "stride": [12, 21]})
    with pytest.raises(TeacherError, match=r"input.stride: expected at most crop, \[12, 20\]"):
        config.resolved(SPEC)


@pytest.mark.parametrize(
    "asked", [{"crop": [6, 6], "scale": [0.5, 2.0]}, {"crop": [6, 6], "photometric": True}]
)
def test_augmentation_that_cached_features_cannot_have_is_refused(asked: dict[str, Any]) -> None:
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "embedded"},
        "probe": {"steps": 2, "batch_size": 2, "lr": 0.01, "mode": "cached"},
    }
    message = r"input\.(scale|photometric): got .*mode cached .*without augmentation.*online"
    with pytest.raises(TeacherError, match=message):
        parse_benchmark(entry | {"input": asked})


@pytest.mark.parametrize("mode, flips", [("cached", False), ("online", True)])
def test_a_row_says_whether_training_images_were_mirrored(
    tmp_path: Path, mode: str, flips: bool
) -> None:
    write_set(tmp_path / "set")
    probe = {"steps": 2, "batch_size": 2, "lr": 0.01, "mode": mode}
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "folder", "root": str(tmp_path / "set"), "classes": ["r", "g", "b"]},
        "probe": probe,
        "input": {"flip": True},
    }
    assert parse_benchmark(entry).model_dump()["input"]["flip"] is flips
    _, protocol = measure(tmp_path / "set", tmp_path / "out", probe=probe)
    assert protocol["input"]["flip"] is flips


def test_cached_features_are_encoded_once_for_all_seeds(tmp_path: Path) -> None:
    write_set(tmp_path / "set", noise=200)
    probe = {"steps": 6, "batch_size": 2, "lr": 0.01, "mode": "cached"}
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "folder", "root": str(tmp_path / "set"), "classes": ["r", "g", "b"]},
        "probe": probe,
    }
    encoded = []

    class Watched(Pixels):
        def extract(self, images: Tensor) -> Any:
            encoded.append(len(images))
            return super().extract(images)

    encoder = Watched(PixelsConfig(patch_size=1, resolution=(8, 8)))
    benchmark, came = build_benchmark(parse_benchmark(entry)), []
    for seed in (0, 1):
        came.append(benchmark.measure(encoder, seed, tmp_path).metrics)
    assert sum(encoded) == 4 + 2 * (3 + 3)  # training once; testing and pictures for each seed
    alone = [measure(tmp_path / "set", tmp_path / f"{s}", seed=s, probe=probe) for s in (0, 1)]
    assert came == [each.metrics for each in alone]
    with torch.no_grad():
        encoder.std.mul_(2)  # another encoder from here on
    assert benchmark.measure(encoder, 0, tmp_path).metrics != came[0]


def test_a_missing_label_map_is_told_with_the_tree(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "set/annotations/validation/1.png").unlink()
    with pytest.raises(DataError, match=r"(?s)there is no .*validation/1.png.*expected under"):
        measure(tmp_path / "set", tmp_path / "out")


def test_counting_on_a_coarser_grid_is_named(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    probe = {"steps": 2, "batch_size": 2, "lr": 0.01}
    _, protocol = measure(tmp_path / "set", tmp_path / "out", probe=probe, labels=[4, 4])
    assert protocol["metric_grid"] == [4, 4]
