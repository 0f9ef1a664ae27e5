"""Passes over images for statistics that were stopped: kept by each rank, and gone on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from data.files import atomic
from distill.runtime import distributed


class Pass(Protocol):
    """One teacher's statistics while they are collected on one rank."""

    def state(self) -> dict[str, Any]:
        """Tensors that `restore` takes."""

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces what was collected by that of an earlier pass."""


class UnfinishedPasses:
    """The file of this rank in the folder of the statistics.

    Args:
        folder: of the statistics, which all ranks share.
        identities: teacher name to what an estimate depends on.
    """

    def __init__(self, folder: Path, identities: Mapping[str, str]) -> None:
        place, ranks = distributed.rank(), distributed.world_size()
        self._path = folder / f"unfinished_{place}_of_{ranks}.pt"
        self._identities = dict(identities)

    def save(self, passes: Mapping[str, Pass], micro_batches: int) -> None:
        """Keeps what was collected from this rank's first micro-batches; every rank calls this."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: self._identities[name] for name in passes}
        states = {name: each.state() for name, each in passes.items()}
        with atomic(self._path) as partial:
            torch.save({"of": facts, "micro_batches": micro_batches, "states": states}, partial)

    def restore(self, passes: Mapping[str, Pass]) -> int:
        """Restores the passes if every rank has kept them, all equally far.

        Every rank must call this.

        Returns:
            The number of this rank's micro-batches that the passes have seen; 0 if nothing is kept.
        """
        kept: dict[str, Any] = {}
        if self._path.exists():
            kept = torch.load(self._path, map_location=distributed.device())
            if kept["of"] != {name: self._identities[name] for name in passes}:
                kept = {}
        found = set(distributed.gather_objects(kept.get("micro_batches", 0)))
        if len(found) > 1 or not kept:
            return 0
        for name, each in passes.items():
            each.restore(kept["states"][name])
        return int(kept["micro_batches"])

    def remove(self) -> None:
        """Deletes what this rank has kept."""
        self._path.unlink(missing_ok=True)
