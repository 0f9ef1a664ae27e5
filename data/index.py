"""The index of local shards: key, offset and size of every image, built once and memory-mapped.

It consists of arrays with about 30 bytes for each sample. All processes of a machine share them
through the page cache when they are on disk.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.bad import check_share, describe
from data.batch import BadSample
from data.errors import DataError
from data.image_files import report_left_out
from data.manifest import MANIFEST, load_manifest
from data.progress import track
from data.tar_scan import ShardScan, scan_shard
from data.text import shown

_VERSION = 2  # 2: hidden files are no images, and sparse and linked members hide no others
_ARRAYS = ("offsets", "sizes", "key_ends", "key_bytes")


@dataclass(frozen=True)
class ShardIndex:
    """Every readable image of some shards, in the order of the shards.

    Attributes:
        paths: of the S shards.
        names: of the shards, as in keys.
        counts: int64 (S,), samples in each shard.
        offsets: uint64 (N,), position of each image's first byte in its shard.
        sizes: uint32 (N,), bytes of each image.
        key_ends: uint64 (N,), end of each key in `key_bytes`.
        key_bytes: uint8, all keys in UTF-8, concatenated.
        bad: samples that cannot be read.
        digest: SHA-256 of names, counts and arrays, which identifies the data.
        directory: folder of the arrays; None where they are in memory only.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    counts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    key_ends: np.ndarray
    key_bytes: np.ndarray
    bad: tuple[BadSample, ...]
    digest: str
    directory: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out arrays on disk, which the receiving process maps again."""
        state = dict(self.__dict__)
        if self.directory is not None:
            state.update(dict.fromkeys(_ARRAYS))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["directory"] is not None:
            state.update(_map_arrays(state["directory"]))
        self.__dict__.update(state)

    def key(self, sample: int) -> str:
        """The key of a sample inside its shard."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_bytes[start : int(self.key_ends[sample])].tobytes().decode()


def load_index(
    paths: Sequence[str],
    names: Sequence[str],
    *,
    max_bad_share: float,
    verify_checksums: bool = False,
    directory: Path | None = None,
) -> ShardIndex:
    """Reads the index of some shards from `directory`, or builds it and stores it there.

    The first process on a machine builds it while the others wait. It is built again when the size
    or modification time of a shard, or a folder's manifest, has changed.

    Args:
        paths: local tar files.
        names: their names in keys.
        max_bad_share: see `DataConfig`.
        verify_checksums: compare with the SHA-256 in each folder's manifest.
        directory: a cache; None keeps the index in memory only.

    Raises:
        DataError: there is no image, or too many bad samples; with counts and the first names.
    """
    if directory is None:
        return _checked(_build(paths, names, verify_checksums), max_bad_share)
    directory.mkdir(parents=True, exist_ok=True)
    home = directory / f"index-{_fingerprint(paths, names, verify_checksums)[:16]}"
    with _locked(directory / ".lock"):
        if not home.is_dir():
            _store(_build(paths, names, verify_checksums), home)
    return _checked(_load(home, paths), max_bad_share)


def _checked(index: ShardIndex, max_bad_share: float) -> ShardIndex:
    check_share(len(index.bad), len(index) + len(index.bad), max_bad_share, index.bad)
    if not len(index):
        reasons = "".join(f"\n  {describe(bad)}" for bad in index.bad[:3])
        raise DataError(
            f"no image in {len(index.paths)} shards, of which the first is "
            f"'{shown(index.paths[0])}'{reasons}"
        )
    return index


def _fingerprint(paths: Sequence[str], names: Sequence[str], verify: bool) -> str:
    facts: list[Any] = [_VERSION, verify]
    for path, name in zip(paths, names, strict=True):
        status = Path(path).stat()
        facts.append((os.path.abspath(path), name, status.st_size, status.st_mtime_ns))
    for manifest in sorted({Path(path).parent / MANIFEST for path in paths}):
        if manifest.exists():
            facts.append((str(manifest), manifest.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _build(paths: Sequence[str], names: Sequence[str], verify: bool) -> ShardIndex:
    manifests = {folder: load_manifest(folder) for folder in {Path(p).parent for p in paths}}
    scans = []
    for path, name in track(list(zip(map(Path, paths), names, strict=True)), "indexing shards"):
        scan = scan_shard(path, name)
        _compare(scan, path, manifests[path.parent], verify)
        report_left_out(path, scan.hidden)
        scans.append(scan)
    whole = [len(s.keys) for s in scans if s.broken is None]
    usual = round(sum(whole) / len(whole)) if whole else 0
    bad = [b for s, n in zip(scans, names, strict=True) for b in (*s.bad, *_missing(s, n, usual))]
    keys = [key.encode() for scan in scans for key in scan.keys]
    index = ShardIndex(
        paths=tuple(paths),
        names=tuple(names),
        counts=np.array([len(s.keys) for s in scans], np.int64),
        offsets=np.array([o for s in scans for o in s.offsets], np.uint64),
        sizes=np.array([n for s in scans for n in s.sizes], np.uint32),
        key_ends=np.cumsum([len(k) for k in keys], dtype=np.uint64),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        bad=tuple(bad),
        digest="",
    )
    digest = hashlib.sha256(json.dumps([names, index.counts.tolist()]).encode())
    for array in _ARRAYS:
        digest.update(getattr(index, array).tobytes())
    return ShardIndex(**{**index.__dict__, "digest": digest.hexdigest()})


def _missing(scan: ShardScan, name: str, usual: int) -> Iterator[BadSample]:
    """Bad samples for the difference of a broken shard to the average shard, at least one."""
    if scan.broken is not None:
        for _ in range(max(1, usual - len(scan.keys))):
            yield BadSample(name, "", scan.broken)


def _compare(scan: ShardScan, path: Path, manifest: dict[str, Any], verify: bool) -> None:
    promised = manifest.get(path.name)
    if promised is None:
        return
    if scan.broken is None and len(scan.keys) != promised["samples"]:
        scan.broken = f"{len(scan.keys)} samples; its manifest lists {promised['samples']}"
    elif scan.broken is None and path.stat().st_size != promised["bytes"]:
        scan.broken = f"{path.stat().st_size} bytes; its manifest lists {promised['bytes']}"
    elif scan.broken is None and verify and _sha256(path) != promised["sha256"]:
        scan.broken = "its SHA-256 differs from its manifest's"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(index: ShardIndex, home: Path) -> None:
    """Writes the index atomically; another machine may do the same."""
    parts = home.with_name(f".{home.name}.{secrets.token_hex(4)}")
    parts.mkdir()
    for name in _ARRAYS:
        np.save(parts / f"{name}.npy", getattr(index, name))
    facts = {
        "names": index.names,
        "counts": index.counts.tolist(),
        "bad": index.bad,
        "digest": index.digest,
    }
    (parts / "index.json").write_text(json.dumps(facts))
    try:
        parts.rename(home)
    except OSError:  # another machine was faster
        shutil.rmtree(parts)
        if not home.is_dir():
            raise


def _load(home: Path, paths: Sequence[str]) -> ShardIndex:
    facts = json.loads((home / "index.json").read_text())
    return ShardIndex(
        paths=tuple(paths),
        names=tuple(facts["names"]),
        counts=np.array(facts["counts"], np.int64),
        bad=tuple(BadSample(*bad) for bad in facts["bad"]),
        digest=facts["digest"],
        directory=home,
        **_map_arrays(home),
    )


def _map_arrays(home: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(_map(home / f"{name}.npy")) for name in _ARRAYS}


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # an empty array cannot be mapped
        return np.load(path)
