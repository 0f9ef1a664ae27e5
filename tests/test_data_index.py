"""The index: what it holds, when it is built again, and what a manifest must agree with."""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from data import index as index_module
from data.errors import DataError
from data.index import ShardIndex, load_index
from data.tar_scan import scan_shard

CONTENTS = ({"a": b"1", "größe": b"22" * 300}, {"c": b"333"}, {"d": b"4" * 600, "e": b"5"})


def _write(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, data in contents.items():
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, contents in enumerate(CONTENTS):
        _write(folder / f"{number}.tar", contents)
    return [str(folder / f"{number}.tar") for number in range(len(CONTENTS))]


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are scanned."""
    names: list[str] = []

    def scan(path: Path, name: str) -> object:
        names.append(name)
        return scan_shard(path, name)

    monkeypatch.setattr(index_module, "scan_shard", scan)
    return names


def _load(
    shards: list[str], cache: Path | None = None, *, share: float = 0.001, verify: bool = False
) -> ShardIndex:
    names = [Path(shard).name for shard in shards]
    return load_index(shards, names, max_bad_share=share, verify_checksums=verify, directory=cache)


def _samples(index: ShardIndex) -> list[tuple[str, bytes]]:
    raws = [Path(path).read_bytes() for path in index.paths]
    shards = np.repeat(np.arange(len(index.paths)), index.counts)
    samples = []
    for number, shard in enumerate(shards):
        raw = raws[shard]
        start, size = int(index.offsets[number]), int(index.sizes[number])
        samples.append((index.key(number), raw[start : start + size]))
    return samples


EVERYTHING = [item for contents in CONTENTS for item in contents.items()]


@pytest.mark.parametrize("cached", [False, True])
def test_the_index_knows_key_and_bytes_of_each_sample(
    shards: list[str], tmp_path: Path, cached: bool
) -> None:
    index = _load(shards, tmp_path / "cache" if cached else None)
    assert _samples(index) == EVERYTHING
    assert index.counts.tolist() == [2, 1, 2]
    assert len(index) == 5


def test_a_stored_index_is_read_and_not_built_again(
    shards: list[str], tmp_path: Path, scans: list[str]
) -> None:
    first = _load(shards, tmp_path / "cache")
    assert scans == ["0.tar", "1.tar", "2.tar"]
    second = _load(shards, tmp_path / "cache")
    assert len(scans) == 3
    assert second.digest == first.digest
    assert _samples(second) == EVERYTHING
    assert isinstance(np.asarray(second.offsets).base, np.memmap)


def test_a_changed_shard_is_noticed_by_its_size_or_its_time(
    shards: list[str], tmp_path: Path
) -> None:
    first = _load(shards, tmp_path / "cache")
    status = os.stat(shards[1])
    _write(Path(shards[1]), {"x": b"333"})
    os.utime(shards[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert os.stat(shards[1]).st_size == status.st_size
    assert _samples(_load(shards, tmp_path / "cache"))[2] == ("x", b"333")
    _write(Path(shards[1]), {"c": b"x" * 20_000})
    os.utime(shards[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    second = _load(shards, tmp_path / "cache")
    assert _samples(second)[2] == ("c", b"x" * 20_000)
    assert second.digest != first.digest


def test_the_digest_is_that_of_the_data_wherever_they_lie(
    shards: list[str], tmp_path: Path
) -> None:
    folder = Path(shards[0]).parent.rename(tmp_path / "moved")
    moved = [str(folder / Path(shard).name) for shard in shards]
    digest = _load(moved).digest
    assert digest == _load(moved, tmp_path / "cache").digest
    folder.rename(Path(shards[0]).parent)
    assert _load(shards).digest == digest
    assert _load(shards[::-1]).digest != digest


def test_a_name_that_is_not_utf8_becomes_a_key_that_can_be_printed(shards: list[str]) -> None:
    _write(Path(shards[1]), {"caf\udce9": b"333"})  # how Python holds the byte e9 of Latin-1
    assert _samples(_load(shards))[2] == ("caf\\xe9", b"333")


def test_a_pickled_index_is_small_and_maps_its_arrays_again(
    shards: list[str], tmp_path: Path
) -> None:
    _write(Path(shards[0]), {f"{i:05}": b"x" for i in range(2000)})
    index = _load(shards, tmp_path / "cache")
    state = pickle.dumps(index)
    assert len(state) < 2000
    assert _samples(pickle.loads(state)) == _samples(index)
    in_memory = _load(shards)
    assert _samples(pickle.loads(pickle.dumps(in_memory))) == _samples(index)


def _load_and_report(shards: list[str], cache: Path, results: object) -> None:
    results.put(_load(shards, cache).digest)  # type: ignore[attr-defined]


def test_processes_that_ask_together_get_one_index(shards: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cache = tmp_path / "cache"
    arguments = (shards, cache, results)
    processes = [context.Process(target=_load_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    digests = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert digests == {_load(shards).digest}
    assert sorted(path.name[:6] for path in cache.iterdir()) == [".lock", "index-"]


def test_who_asks_during_a_build_waits_for_it(shards: list[str], tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=_load, args=(shards, tmp_path))
        other.start()
        other.join(0.1)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_a_killed_build_leaves_nothing_that_looks_whole(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(KeyboardInterrupt):
            _load(shards, tmp_path / "cache")
    assert _samples(_load(shards, tmp_path / "cache")) == EVERYTHING


def test_bad_samples_below_the_share_are_named_fresh_and_from_the_cache(
    shards: list[str], tmp_path: Path
) -> None:
    _write(Path(shards[1]), {"c": b"333", "empty": b""})
    for _ in range(2):
        index = _load(shards, tmp_path / "cache")
        assert [tuple(bad) for bad in index.bad] == [("1.tar", "empty", "an image of 0 bytes")]


@pytest.mark.parametrize("cached", [False, True])
def test_bad_samples_above_the_share_stop_with_their_names(
    shards: list[str], tmp_path: Path, cached: bool
) -> None:
    _write(Path(shards[1]), {f"empty{i}": b"" for i in range(9)})
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):
        with pytest.raises(DataError, match=r"9 of 13 samples are bad.*\n  1.tar/empty0: an image"):
            _load(shards, cache)


def test_a_broken_shard_counts_for_the_samples_of_a_usual_one(shards: list[str]) -> None:
    for shard in (shards[0], shards[2]):
        _write(Path(shard), {f"{i}": b"x" for i in range(100)})
    Path(shards[1]).write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=r"100 of 300 samples are bad.*\n  1.tar: the file is not a tar"
    ):
        _load(shards)
    assert len(_load(shards, share=0.4)) == 200


def test_a_broken_shard_counts_at_least_once(shards: list[str]) -> None:
    raw = Path(shards[2]).read_bytes()
    Path(shards[2]).write_bytes(raw[: 512 + 1024 + 512 + 512])  # both samples, no end
    index = _load(shards)
    assert [bad.shard for bad in index.bad] == ["2.tar"]
    assert _samples(index) == EVERYTHING


def test_shards_without_any_image_are_refused(shards: list[str]) -> None:
    for shard in shards:
        Path(shard).write_bytes(b"")
    with pytest.raises(DataError, match=r"no image in 3 shards, of which the first is '.*0.tar'"):
        _load(shards, share=0.9)


def _manifest(shards: list[str], **wrong: object) -> None:
    listed = []
    for shard, contents in zip(map(Path, shards), CONTENTS, strict=True):
        facts = {
            "name": shard.name,
            "samples": len(contents),
            "bytes": shard.stat().st_size,
            "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
        }
        listed.append({**facts, **wrong} if shard.name == "1.tar" else facts)
    path = Path(shards[0]).parent / "manifest.json"
    path.write_text(json.dumps({"complete": True, "shards": listed}))


def test_shards_that_agree_with_their_manifest_are_good(shards: list[str]) -> None:
    _manifest(shards)
    assert _load(shards, share=0.0, verify=True).bad == ()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"samples": 7}, "1 samples; its manifest lists 7"),
        ({"bytes": 10}, "10240 bytes; its manifest lists 10"),
    ],
)
def test_a_shard_unlike_its_manifest_is_broken(
    shards: list[str], wrong: dict[str, int], reason: str
) -> None:
    _manifest(shards, **wrong)
    assert [tuple(bad) for bad in _load(shards).bad] == [("1.tar", "", reason)]


def test_a_flipped_image_bit_is_found_by_checksums_where_asked_for(
    shards: list[str], tmp_path: Path
) -> None:
    _manifest(shards)
    raw = bytearray(Path(shards[1]).read_bytes())
    raw[512] ^= 1  # the first byte of the image
    Path(shards[1]).write_bytes(raw)
    for cache in (None, tmp_path / "cache"):
        assert _load(shards, cache).bad == ()
        bad = _load(shards, cache, verify=True).bad
        assert [tuple(b) for b in bad] == [("1.tar", "", "its SHA-256 differs from its manifest's")]


def test_a_changed_manifest_is_compared_again(shards: list[str], tmp_path: Path) -> None:
    assert _load(shards, tmp_path / "cache").bad == ()
    _manifest(shards, samples=7)
    assert len(_load(shards, tmp_path / "cache").bad) == 1
    _manifest(shards)
    assert _load(shards, tmp_path / "cache").bad == ()
