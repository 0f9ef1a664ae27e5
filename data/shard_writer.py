"""Writes images as webdataset shards; interruptions do not change their bytes.

The images are written in the order of their keys, while threads decode the next ones. A shard gets
its name when it is complete and on disk, and the manifest is updated after each shard.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.decode import BadImage
from data.errors import DataError
from data.gather import ImageFiles, open_images
from data.image_files import IMAGES
from data.intake import LeftOut, Sample, take_image
from data.manifest import MANIFEST, Journal, Manifest, read_manifest, store_manifest
from data.progress import track
from data.read_ahead import read_ahead
from data.shard_file import OpenShard, unique_keys
from data.tar_walk import MAX_IMAGE_BYTES
from data.text import shown


@dataclass(frozen=True)
class WriteOptions:
    """Options that decide the bytes of the shards.

    Attributes:
        target_size: largest size of a shard in bytes, unless a single image is larger.
        max_side: largest side in pixels; larger images are re-encoded. None keeps all bytes.
        quality: of re-encoded JPEGs, 1 to 100.
    """

    target_size: int
    max_side: int | None = None
    quality: int = 95


def write_shards(source: Path, out: Path, options: WriteOptions) -> Manifest:
    """Writes the images of a folder, zip or tar as `out/000000.tar`, ... and the manifest returned.

    The same call continues an interrupted run and leaves a complete one unchanged.

    Raises:
        DataError: no usable image, other files or another writer in `out`, or the disk is full.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"the output '{out}' lies inside the source '{source}'")
    try:
        with open_images(source) as files:
            if not files.sizes:
                raise DataError(f"'{source}' contains no image ({IMAGES}){_others(files)}")
            out.mkdir(parents=True, exist_ok=True)
            with Journal(out) as journal:
                manifest = _begin(files, out, options)
                if not manifest["complete"]:
                    _Writer(files, out, options, manifest, journal).write()
                journal.remove()
    except OSError as error:
        begun = (out / MANIFEST).exists()
        hint = "; the same command continues after the last complete shard" if begun else ""
        raise DataError(f"{error.filename or out}: {error.strerror}{hint}") from error
    return manifest


def _others(files: ImageFiles) -> str:
    found = ", ".join(f"{count} {shown(kind)}" for kind, count in files.ignored.items())
    return f"; there are {found}" if found else ""


def _begin(files: ImageFiles, out: Path, options: WriteOptions) -> Manifest:
    """Reads the manifest to continue from, or makes a new one if the folder is empty.

    Raises:
        DataError: the folder contains other files, or shards of another source or other options.
    """
    listing = json.dumps(list(files.sizes.items())).encode()
    identity = {"images": len(files.sizes), "sha256": hashlib.sha256(listing).hexdigest()}
    manifest = read_manifest(out)
    if manifest is None:
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others:
            raise DataError(
                f"'{out}' contains '{others[0]}' but no {MANIFEST}; choose an empty folder"
            )
        manifest = _new_manifest(files, identity, options)
        store_manifest(out, manifest)
        return manifest
    begun, asked = manifest["options"], asdict(options)
    for name in asked:
        if begun.get(name) != asked[name]:
            raise DataError(
                f"'{out}' was begun with {name}={begun.get(name)}, this run has {asked[name]}; "
                "use the same options or choose an empty folder"
            )
    if manifest["source"] != identity:
        raise DataError(
            f"'{out}' was written from a source of {manifest['source']['images']} images, this one "
            f"has {identity['images']} or other names and sizes; choose an empty folder"
        )
    for shard in manifest["shards"]:
        path = out / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise DataError(
                f"'{path}' is missing or was changed since it was written; empty the folder and "
                "start again"
            )
    return manifest


def _new_manifest(files: ImageFiles, identity: dict[str, Any], options: WriteOptions) -> Manifest:
    left_out = [{"name": n, "fault": "unreadable", "detail": d} for n, d in files.damaged]
    return {
        "version": 1,
        "complete": False,
        "source": identity,
        "options": asdict(options),
        "images_done": 0,
        "samples": 0,
        "bytes": 0,
        "left_out_counts": {"unreadable": len(left_out)} if left_out else {},
        "ignored": files.ignored,
        "sizes": [],
        "left_out": left_out,
        "shards": [],
    }


class _Writer:
    """Writes the shards; manifest and journal hold its state after every shard."""

    def __init__(
        self,
        files: ImageFiles,
        out: Path,
        options: WriteOptions,
        manifest: Manifest,
        journal: Journal,
    ) -> None:
        self._files = files
        self._out = out
        self._options = options
        self._manifest = manifest
        self._journal = journal
        self._images = sorted(zip(unique_keys(list(files.sizes)), files.sizes, strict=True))
        self._known = dict(journal.load(manifest["samples"]))
        self._histogram = Counter(
            {(s["height"], s["width"]): s["images"] for s in manifest["sizes"]}
        )
        self._records: list[tuple[bytes, int]] = []

    def write(self) -> None:
        """Writes the remaining shards and completes the manifest."""
        first, last = self._manifest["images_done"], len(self._images)
        names = [name for _, name in self._images[first:]]
        with closing(read_ahead(self._take, names)) as taken:
            self._write(first, last, taken)
        self._finish(last)

    def _write(self, first: int, last: int, taken: Iterator[Sample | LeftOut]) -> None:
        shard = None
        try:
            for position in track(range(first, last), "writing shards"):
                key, name = self._images[position]
                sample = self._judge(next(taken))
                if isinstance(sample, LeftOut):
                    entry = {"name": name, "fault": sample.fault, "detail": sample.detail}
                    self._manifest["left_out"].append(entry)
                    continue
                if shard is not None and not shard.has_room(sample, self._options.target_size):
                    self._close(shard, position)
                    shard = None
                if shard is None:
                    shard = OpenShard(self._out / f"{len(self._manifest['shards']):06}.tar")
                shard.add(key, sample)
                self._note(sample, position)
            if shard is not None:
                self._close(shard, last)
        finally:
            if shard is not None:
                shard.discard()

    def _take(self, name: str) -> Sample | LeftOut:
        size = self._files.sizes[name]
        if size > MAX_IMAGE_BYTES:
            return LeftOut("decompression bomb", f"a file of {size} bytes")
        try:
            data = self._files.read(name)
        except BadImage as error:
            return LeftOut("unreadable", str(error))
        except OSError as error:  # the source is gone, so its other images would be left out too
            raise DataError(
                f"'{name}' of the source cannot be read any more: {error.strerror}; the same "
                "command continues after the last complete shard"
            ) from error
        return take_image(data, max_side=self._options.max_side, quality=self._options.quality)

    def _judge(self, taken: Sample | LeftOut) -> Sample | LeftOut:
        if isinstance(taken, Sample) and taken.digest in self._known:
            first = self._images[self._known[taken.digest]][1]
            return LeftOut("duplicate", f"the same bytes as '{first}'")
        return taken

    def _note(self, sample: Sample, position: int) -> None:
        self._known[sample.digest] = position
        self._records.append((sample.digest, position))
        self._histogram[_size_class(sample.height), _size_class(sample.width)] += 1

    def _close(self, shard: OpenShard, position: int) -> None:
        facts = shard.publish()
        self._journal.add(self._records)
        self._records = []
        self._manifest["shards"].append(facts)
        self._manifest["samples"] += facts["samples"]
        self._manifest["bytes"] += facts["bytes"]
        self._store(position)

    def _finish(self, position: int) -> None:
        if not self._manifest["shards"]:
            self._store(0)
            first = self._manifest["left_out"][0]
            raise DataError(
                f"none of {position} images can be used; the first is '{first['name']}': "
                f"{first['fault']}, {first['detail']}"
            )
        self._manifest["complete"] = True
        self._store(position)

    def _store(self, position: int) -> None:
        self._manifest["images_done"] = position
        self._manifest["sizes"] = [
            {"height": height, "width": width, "images": count}
            for (height, width), count in sorted(self._histogram.items())
        ]
        faults = Counter(entry["fault"] for entry in self._manifest["left_out"])
        self._manifest["left_out_counts"] = dict(sorted(faults.items()))
        store_manifest(self._out, self._manifest)


def _size_class(side: int) -> int:
    """The largest power of two up to a side: the lower end of its class in the histogram."""
    return 1 << (side.bit_length() - 1)
