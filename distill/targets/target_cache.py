"""A cache of targets on disk: shards of safetensors, indexed by teacher, route, image and view.

    FOLDER/
      cache.json                          written last: the recipe's facts and each group's views
      unfinished.json                     in its place until then: the facts, by which a stopped
                                          command goes on
      statistics/<teacher>.safetensors    and .json: the statistics of each teacher
      <teacher>-<route>-<H>x<W>/          one group; see `tasks.cached_targets.group_of`
        <rank>-<number>.safetensors       one shard: rows of targets; the metadata has their views

A shard holds the standardised maps as fp16, or as int8 with one float32 scale for each image,
max |y| / 127: PHI-S gives all channels one variance, so that one scale fits all of them. Summaries
are fp16. A view is an image's key and a checksum of the pixels that the teacher saw, which depends
on crop, flip and size.
"""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from data.files import write_text
from distill.runtime.errors import RecipeError
from teachers.features import Features
from teachers.files import save_tensors

CachePrecision = Literal["int8", "fp16"]
HEADER = "cache.json"
UNFINISHED = "unfinished.json"
_SHARD_BYTES = 64_000_000
_OPEN_SHARDS = 64


class ViewKey(NamedTuple):
    """What a teacher saw: the key of an image, and a checksum of its uint8 pixels."""

    key: str
    checksum: int


def views_of(images: Tensor, keys: Sequence[str]) -> list[ViewKey]:
    """The view keys of a batch (B, 3, H, W) in [0, 1], of whole 255ths, with B keys."""
    pixels = (images * 255).round().byte().cpu().numpy()
    return [ViewKey(k, zlib.crc32(p.tobytes())) for k, p in zip(keys, pixels, strict=True)]


class CacheWriter:
    """Collects targets on one rank and writes them shard by shard, with the rank in their names.

    Args:
        folder: of the cache.
        precision: of the maps.
        rank: of this process.
        kept: group to the views in shards of an earlier command, of all ranks.
    """

    def __init__(
        self,
        folder: Path,
        precision: CachePrecision,
        rank: int,
        kept: Mapping[str, Collection[ViewKey]] | None = None,
    ) -> None:
        self._folder, self._precision, self._rank = folder, precision, rank
        self._pending: dict[str, list[tuple[ViewKey, dict[str, Tensor]]]] = {}
        self._done: dict[str, set[ViewKey]] = {}
        self._kept = kept or {}

    @property
    def num_kept(self) -> dict[str, int]:
        """Group to the number of kept views."""
        return {group: len(views) for group, views in self._kept.items() if views}

    def missing(self, group: str, views: Sequence[ViewKey]) -> list[int]:
        """Positions in `views` of those that a group does not have yet."""
        done, kept = self._done.setdefault(group, set()), self._kept.get(group, ())
        return [n for n, view in enumerate(views) if view not in done and view not in kept]

    def add(self, group: str, views: Sequence[ViewKey], features: Features) -> None:
        """Adds the targets of views: summary (B, S) or None, spatial (B, D, h, w)."""
        pending = self._pending.setdefault(group, [])
        for number, view in enumerate(views):
            row = _encoded(features.spatial[number], self._precision)
            if features.summary is not None:
                row["summary"] = features.summary[number].half()
            pending.append((view, {name: t.cpu() for name, t in row.items()}))
        self._done.setdefault(group, set()).update(views)
        if len(pending) * pending[0][1]["spatial"].nbytes >= _SHARD_BYTES:
            self._write(group)

    def finish(self) -> dict[str, int]:
        """Writes the last shards; returns group to number of views, without kept ones."""
        for group in self._pending:
            self._write(group)
        return {group: len(views) for group, views in self._done.items()}

    def _write(self, group: str) -> None:
        rows = self._pending[group]
        if not rows:
            return
        folder = self._folder / group
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob(f"{self._rank:05d}-*.safetensors")))
        tensors = {name: torch.stack([row[name] for _, row in rows]) for name in rows[0][1]}
        views = json.dumps([view for view, _ in rows])
        path = folder / f"{self._rank:05d}-{number:06d}.safetensors"
        save_tensors(path, tensors, {"views": views})
        self._pending[group] = []


def _encoded(spatial: Tensor, precision: CachePrecision) -> dict[str, Tensor]:
    if precision == "fp16":
        return {"spatial": spatial.half()}
    scale = spatial.abs().amax().clamp(min=1e-12) / 127
    return {"spatial": (spatial / scale).round().to(torch.int8), "scale": scale.float()}


class TargetCache:
    """Reads the folder of a cache that `CacheWriter` wrote.

    Raises:
        RecipeError: the folder holds no complete cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / HEADER).is_file():
            raise RecipeError(
                f"targets.cached: {folder} holds no complete cache of targets; write one with "
                f"`python -m distill.write_targets RECIPE {folder}`"
            )
        self.facts: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        self._index: dict[str, dict[ViewKey, tuple[Path, int]]] = {}
        for group, places in stored_views(folder).items():
            if group in self.facts["views"]:
                self._index[group] = places

    @property
    def groups(self) -> list[str]:
        """The groups that were written."""
        return sorted(self._index)

    def read(self, group: str, views: Sequence[ViewKey], device: torch.device) -> Features:
        """The targets of some views, in the precision of the cache.

        Raises:
            RecipeError: an image or its view is missing; names it and the cure.
        """
        index = self._index[group]
        for view in views:
            if view not in index:
                raise RecipeError(self._missing(group, view))
        rows = [_row(*index[view]) for view in views]
        tensors = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        spatial = tensors["spatial"].float()
        if "scale" in tensors:
            spatial = spatial * tensors["scale"].view(-1, 1, 1, 1)
        summary = tensors["summary"].float() if "summary" in tensors else None
        return Features(summary, spatial)

    def _missing(self, group: str, view: ViewKey) -> str:
        place = f"targets.cached: {self.folder / group}"
        if any(view.key == other.key for other in self._index[group]):
            return (
                f"{place} has image {view.key} in another view only: another crop, flip or decoder "
                "than this run's; with random crops a cache has the views of the steps that it was "
                "written for, with data.sources.0.crops=4 or data.augmentation=none those of "
                "every step"
            )
        return (
            f"{place} has no image {view.key}; write a cache over these images and as many steps, "
            "or train on the images that it has"
        )


def write_header(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the facts that a cache depends on; the cache is complete only with this file."""
    write_text(folder / HEADER, json.dumps(facts, indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)


def stored_views(folder: Path) -> dict[str, dict[ViewKey, tuple[Path, int]]]:
    """Group to view to its shard and row there, of a cache that may be unfinished."""
    found: dict[str, dict[ViewKey, tuple[Path, int]]] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        views = json.loads(_open(path).metadata().get("views", "[]"))
        places = {ViewKey(*view): (path, row) for row, view in enumerate(views)}
        found.setdefault(path.parent.name, {}).update(places)
    return found


def _row(path: Path, row: int) -> dict[str, Tensor]:
    shard = _open(path)
    return {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118


@lru_cache(_OPEN_SHARDS)
def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")
