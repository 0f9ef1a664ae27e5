"""The embedded set: exact labels, the same pixels every time, and no colour that tells a class."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from data.errors import DataError
from data.labelled import embedded
from data.labelled.embedded import EmbeddedSegmentation
from data.labelled.segmentation import AnySegmentation
from data.seeds import sample_rng
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.evaluation.models import Pixels, PixelsConfig


def parsed(**options: Any) -> EmbeddedSegmentation:
    adapter: TypeAdapter[Any] = TypeAdapter(AnySegmentation)
    found = adapter.validate_python({"kind": "embedded", **options})
    assert isinstance(found, EmbeddedSegmentation)
    return found


def test_what_is_no_shape_is_the_photograph_to_the_last_bit() -> None:
    found = parsed()
    for sample in found.samples("test")[:8]:
        image, labels = found.read(sample)
        rng = sample_rng(0, 0, sample.key)
        held_out = [p for p in embedded.PHOTOGRAPHS if not p.scales]
        photograph = embedded._background(held_out[int(rng.random() * 3)], rng)
        same = (image == (photograph * 255).round().astype(np.uint8)).all(-1)
        assert same[labels == 0].all()
        assert same[labels > 0].mean() < 0.1


def test_splits_and_seeds_differ_and_reading_again_does_not() -> None:
    found = parsed(train_images=2, test_images=3)
    train, test = found.samples("train"), found.samples("test")
    assert (len(train), len(test)) == (2, 3)
    first = found.read(train[0])
    first[0][:] = 0  # the reader's own copy
    embedded._drawn.cache_clear()
    image, labels = found.read(train[0])
    assert (labels == first[1]).all()
    others = [found.read(train[1]), found.read(test[0]), parsed(seed=1).read(train[0])]
    assert all((labels != other[1]).any() for other in others)
    assert image.shape == (256, 256, 3)
    assert (image.dtype, labels.dtype) == (np.uint8, np.uint8)


@pytest.mark.long
def test_every_class_has_its_share_and_no_colour_of_its_own() -> None:
    found = parsed()
    images, labels = zip(*(found.read(s) for s in found.samples("train")[:60]), strict=True)
    pixels, classes = np.stack(images) / 255, np.stack(labels)
    shares = np.bincount(classes.ravel(), minlength=7) / classes.size
    assert len(shares) == len(found.names) == 7
    assert 0.3 < shares[0] < 0.6
    assert shares[1:].min() > 0.05
    means = np.stack([pixels[classes == number].mean(0) for number in range(7)])
    within = min(pixels[classes == number].std() for number in range(1, 7))
    assert np.ptp(means, axis=0).max() < 0.6 * within


def test_the_segmentation_benchmark_runs_on_it_without_a_folder_of_the_user(tmp_path: Path) -> None:
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "embedded", "train_images": 4, "test_images": 2},
        "probe": {"steps": 2, "batch_size": 2, "lr": 0.01, "mode": "cached"},
    }
    encoder = Pixels(PixelsConfig(patch_size=32, resolution=(256, 256)))
    figures, protocol = build_benchmark(parse_benchmark(entry)).measure(encoder, 0, tmp_path)
    assert 0 <= figures["miou"] <= 100
    assert (protocol["classes"], protocol["test_images"]) == (7, 2)


def test_it_takes_no_root() -> None:
    with pytest.raises(ValidationError, match="root"):
        parsed(root="somewhere")


def test_missing_photographs_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    embedded._drawn.cache_clear()
    embedded._pixels.cache_clear()
    found = parsed()
    with pytest.raises(DataError, match="run `pip install scikit-image scikit-learn`"):
        found.read(found.samples("test")[0])
