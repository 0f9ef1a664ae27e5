"""Targets on disk: what is kept of them, how they are found, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.runtime.errors import RecipeError
from distill.targets.target_cache import (
    CachePrecision,
    CacheWriter,
    TargetCache,
    ViewKey,
    views_of,
    write_header,
)
from teachers.features import Features

CPU = torch.device("cpu")


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 8, 6), generator=generator) / 255


def features(count: int) -> Features:
    generator = torch.Generator().manual_seed(1)
    spatial = torch.randn(count, 5, 2, 3, generator=generator)
    return Features(
        torch.randn(count, 4, generator=generator), spatial * torch.arange(1, 6)[:, None, None]
    )


def written(
    folder: Path, precision: CachePrecision, views: list[ViewKey], found: Features
) -> TargetCache:
    writer = CacheWriter(folder, precision, rank=0)
    writer.add("clip-matched-8x6", views[:2], Features(*(each[:2] for each in found)))
    writer.add("clip-matched-8x6", views[2:], Features(*(each[2:] for each in found)))
    write_header(folder, {"views": writer.finish()})
    return TargetCache(folder)


def test_a_view_is_a_key_and_the_pixels_that_were_shown() -> None:
    (one, other), (moved, _) = (views_of(p, ["a", "b"]) for p in (pictures(2), pictures(2, seed=3)))
    assert (one.key, other.key, moved.key) == ("a", "b", "a")
    assert views_of(pictures(2), ["a", "b"]) == [one, other]
    assert moved.checksum != one.checksum
    flipped = pictures(1).flip(3)
    assert views_of(flipped, ["a"])[0] != one


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_maps_come_back_within_half_a_step_of_their_precision_in_any_order(
    precision: CachePrecision, tmp_path: Path
) -> None:
    due, views = features(5), views_of(pictures(5), list("abcde"))
    cache = written(tmp_path, precision, views, due)
    order = [3, 0, 4]
    summary, spatial = cache.read("clip-matched-8x6", [views[i] for i in order], CPU)
    largest = due.spatial[order].abs().amax((1, 2, 3), keepdim=True)
    bound = largest / 254 if precision == "int8" else largest * 2**-11
    assert spatial.dtype == torch.float32
    assert ((spatial - due.spatial[order]).abs() <= bound * (1 + 1e-5)).all()
    assert not torch.equal(spatial, due.spatial[order])
    assert summary is not None
    torch.testing.assert_close(summary, features(5)[0][order], rtol=2**-11, atol=1e-6)


def test_int8_takes_a_byte_a_value(tmp_path: Path) -> None:
    written(tmp_path, "int8", views_of(pictures(5), list("abcde")), features(5))
    (shard,) = tmp_path.glob("*/*.safetensors")
    stored = load_file(shard)
    assert (stored["spatial"].dtype, stored["scale"].dtype) == (torch.int8, torch.float32)
    assert stored["spatial"].shape == (5, 5, 2, 3)


def test_a_map_of_zeros_stays_one(tmp_path: Path) -> None:
    due = Features(None, torch.zeros(3, 2, 2, 2))
    writer = CacheWriter(tmp_path, "int8", rank=0)
    views = views_of(pictures(3), list("abc"))
    writer.add("g", views, due)
    write_header(tmp_path, {"views": writer.finish()})
    summary, spatial = TargetCache(tmp_path).read("g", views, CPU)
    assert summary is None
    assert torch.equal(spatial, due.spatial)


def test_full_shards_are_written_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.targets.target_cache._SHARD_BYTES", 2 * 5 * 2 * 3)
    views, due = views_of(pictures(5), list("abcde")), features(5)
    cache = written(tmp_path, "int8", views, due)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
    assert cache.read("clip-matched-8x6", views, CPU).spatial.shape == (5, 5, 2, 3)


def test_no_view_is_written_twice(tmp_path: Path) -> None:
    views = views_of(pictures(3), list("abc"))
    writer = CacheWriter(tmp_path, "fp16", rank=0)
    writer.add("g", views[:2], Features(None, torch.ones(2, 1, 1, 1)))
    assert writer.missing("g", views) == [2]
    assert writer.missing("other", views) == [0, 1, 2]


def test_an_image_and_a_view_that_are_not_there_are_told_apart(tmp_path: Path) -> None:
    views = views_of(pictures(3), list("abc"))
    cache = written(tmp_path, "int8", views, features(3))
    (other,) = views_of(pictures(1, seed=7), ["a"])
    with pytest.raises(RecipeError, match="has image a in another view only: another crop, flip"):
        cache.read("clip-matched-8x6", [other], CPU)
    (unknown,) = views_of(pictures(1), ["z"])
    with pytest.raises(RecipeError, match="clip-matched-8x6 has no image z; write a cache over"):
        cache.read("clip-matched-8x6", [unknown], CPU)


def test_a_folder_without_a_whole_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no complete cache of targets; write one with `python -m"
    ):
        TargetCache(tmp_path)
