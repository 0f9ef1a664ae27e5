"""Statistics that standardise each teacher's targets: fitted once, then stored and applied.

For the maps: mean and covariance in float64, merged exactly over the ranks (Chan et al. 1983,
equation 2.1), from which PHI-S follows. For the summaries: the mean direction and the angular
dispersion around it (C-RADIOv4). An estimate is kept in the run's folder under a fingerprint of the
teacher, its weights, its upsampler, the data and the sizes, so that a resumed run reads it again.
Each is written as soon as it is done, and a pass that is stopped goes on where it was.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import write_text
from distill.objective.losses import angles
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.runtime.stopping import Stopped, agreed_steps
from distill.runtime.tracking import log
from distill.targets.ensemble import Ensemble
from distill.targets.routes import RouteChoice
from distill.targets.unfinished_statistics import UnfinishedPasses
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s, load_phi_s, save_phi_s

IN_CHECKPOINT = "checkpoint"  # stands for the fingerprint in a checkpoint's files


class TargetStatistics(NamedTuple):
    """The statistics of one teacher.

    Attributes:
        phi_s: standardises its maps.
        dispersion: () mean squared angle, in radians squared, of the summaries to their mean
            direction; 1 for a teacher without a summary.
    """

    phi_s: PhiS
    dispersion: Tensor


class CalibrationBatch(NamedTuple):
    """Images that statistics are estimated on.

    Attributes:
        images: (B, 3, H, W) in [0, 1], this rank's.
        routes: teacher name to route, of the teachers that see the images.
        num_before: teacher name to the number of images, over all ranks, that it saw in earlier
            steps.
    """

    images: Tensor
    routes: Mapping[str, RouteChoice]
    num_before: Mapping[str, int]


class Statistics:
    """The statistics of all teachers that any rank runs.

    Args:
        phi_s: whether `apply` standardises maps; if not, the dispersions alone are of use.

    Attributes:
        of: teacher name to its statistics.
    """

    def __init__(self, *, phi_s: bool = True) -> None:
        self._phi_s = phi_s
        self.of: dict[str, TargetStatistics] = {}

    def apply(self, name: str, features: Features) -> Features:
        """Standardises one teacher's map."""
        if not self._phi_s:
            return features
        with torch.no_grad():
            return features._replace(spatial=self.of[name].phi_s(features.spatial))

    def standardise_linear(self, name: str, linear: nn.Linear) -> nn.Linear:
        """A layer that returns the outputs of `linear` as `apply` standardises them.

        The outputs are in the own space of the teacher; without PHI-S, or without statistics of
        the teacher, as it does not run, this is the layer itself.
        """
        if not self._phi_s or name not in self.of:
            return linear
        return self.of[name].phi_s.standardise_linear(linear)

    def dispersions(self) -> dict[str, Tensor]:
        """Teacher name to the angular dispersion of its summaries, () in radians squared."""
        device = distributed.device()
        return {name: each.dispersion.to(device) for name, each in self.of.items()}

    def save(self, folder: Path, identity: str = IN_CHECKPOINT) -> None:
        """Writes `<teacher>.safetensors` and `.json`; `load` has to ask for the same identity."""
        for name, each in self.of.items():
            save_statistics(folder / f"{name}.safetensors", each, identity)

    def load(self, folder: Path, names: Iterable[str], identity: str = IN_CHECKPOINT) -> None:
        """Replaces the statistics of some teachers by those in a folder.

        Raises:
            RecipeError: a file is missing, or was saved under another identity.
        """
        for name in names:
            path = folder / f"{name}.safetensors"
            statistics = load_statistics(path, identity)
            if statistics is None:
                raise RecipeError(f"{path}: missing or damaged")
            self._set(name, statistics)

    def fit(
        self,
        ensemble: Ensemble,
        batches: Iterator[CalibrationBatch],
        folder: Path,
        facts: Mapping[str, object],
        num_images: int,
        inherited: Mapping[str, TargetStatistics] | None = None,
    ) -> dict[str, str]:
        """Reads the statistics of all ranks' teachers from a folder, or estimates and writes them.

        Every rank calls this, and gets the same.

        Args:
            ensemble: the teachers that this rank runs.
            batches: this rank's images; read only if statistics are missing.
            folder: holds `<teacher>.safetensors` and `<teacher>.json`.
            facts: what an estimate depends on besides the teacher: data, sizes, number of images.
            num_images: images that each teacher sees, over all ranks, rounded up to whole steps.
            inherited: teacher name to statistics that are taken as they are.

        Returns:
            Teacher name to `estimated`, `cached` or `inherited`.
        """
        known, inherited = _identities_and_specs(ensemble, facts), inherited or {}
        found = {
            name: inherited.get(name) or load_statistics(folder / f"{name}.safetensors", identity)
            for name, (identity, _) in known.items()
        }
        # Ranks may see a shared folder at different moments: rank 0 decides.
        missing = distributed.broadcast_object([name for name, s in found.items() if s is None])
        if missing:
            passes = {name: StatisticsPass(known[name][1]) for name in missing}
            kept = UnfinishedPasses(folder, {name: known[name][0] for name in missing})
            for name, estimate in _estimate(ensemble, batches, passes, num_images, kept):
                found[name] = estimate
                if distributed.rank() == 0:
                    save_statistics(folder / f"{name}.safetensors", estimate, known[name][0])
            kept.remove()
            distributed.barrier()
        # Inherited ones of teachers that do not run are kept: an export to their space needs them.
        for name, statistics in {**inherited, **found}.items():
            assert statistics is not None
            self._set(name, statistics)
        kinds = dict.fromkeys(found, "cached") | dict.fromkeys(missing, "estimated")
        return kinds | dict.fromkeys(inherited.keys() & found.keys(), "inherited")

    def _set(self, name: str, statistics: TargetStatistics) -> None:
        phi_s = statistics.phi_s.to(distributed.device())
        self.of[name] = statistics._replace(phi_s=phi_s)


def _identities_and_specs(
    ensemble: Ensemble, facts: Mapping[str, object]
) -> dict[str, tuple[str, FeatureSpec]]:
    """By name, of the teachers of all ranks."""
    own = {
        name: (statistics_fingerprint(fingerprint, facts), ensemble.teachers[name].spec)
        for name, fingerprint in ensemble.fingerprints().items()
    }
    return {name: pair for each in distributed.gather_objects(own) for name, pair in each.items()}


def _estimate(
    ensemble: Ensemble,
    batches: Iterator[CalibrationBatch],
    passes: "dict[str, StatisticsPass]",
    num_images: int,
    kept: UnfinishedPasses,
) -> Iterator[tuple[str, TargetStatistics]]:
    """Runs each teacher until it has seen enough images; all ranks stop at the same step.

    Yields:
        A teacher's name and statistics, as soon as it is done.
    """
    number = kept.restore(passes)
    if number:
        log.info("statistics: %d micro-batches of each rank were kept", number)
    whole = True
    try:
        for images, routes, num_before in agreed_steps(itertools.islice(batches, number, None)):
            for name in [name for name in passes if num_before[name] >= num_images]:
                yield name, passes.pop(name).finish()
            if not passes:
                return
            wanted = {name: choice for name, choice in routes.items() if name in passes}
            whole = False
            for name, features in ensemble(images, wanted).items():
                passes[name].update(features)
            number, whole = number + 1, True
    except Stopped:
        if whole:
            kept.save(passes, number)
        raise
    for name in list(passes):
        yield name, passes.pop(name).finish()


class StatisticsPass:
    """Collects one teacher's statistics on one rank, then merges those of all ranks.

    Args:
        spec: the teacher's. A rank that does not run the teacher contributes nothing.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self._spatial = FeatureStatistics.zeros(spec.spatial_dim, device=distributed.device())
        self._summary_dim = spec.summary_dim
        self._summaries: list[Tensor] = []

    def update(self, features: Features) -> None:
        """Adds a batch: summary (B, D_summary) or None, spatial (B, D, h, w)."""
        self._spatial.update(features.spatial)
        if features.summary is not None:
            self._summaries.append(features.summary.cpu())

    def state(self) -> dict[str, Any]:
        """What was collected, as tensors."""
        own = self._spatial
        return {"spatial": (own.count, own.mean, own.scatter), "summaries": self._summaries}

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces what was collected by that of an earlier pass."""
        self._spatial = FeatureStatistics(*state["spatial"])
        self._summaries = [each.cpu() for each in state["summaries"]]

    def finish(self) -> TargetStatistics:
        """Merges over the ranks and fits; every rank must call this, and gets the same."""
        merged = merge_over_ranks(self._spatial)
        dispersion = torch.ones(())
        if self._summary_dim is not None and distributed.any_rank(bool(self._summaries)):
            none = torch.empty(0, self._summary_dim)
            dispersion = angular_dispersion(torch.cat([none, *self._summaries]))
        return TargetStatistics(fit_phi_s(merged), dispersion)


def merge_over_ranks(statistics: FeatureStatistics) -> FeatureStatistics:
    """The statistics of all ranks' samples, from two sums over the ranks (Chan et al. 1983)."""
    if distributed.world_size() == 1:
        return statistics
    total = distributed.all_reduce(statistics.count.clone())
    mean = distributed.all_reduce(statistics.count * statistics.mean) / total
    shift = statistics.mean - mean
    between = statistics.count * torch.outer(shift, shift)
    return FeatureStatistics(total, mean, distributed.all_reduce(statistics.scatter + between))


def angular_dispersion(summaries: Tensor) -> Tensor:
    """Mean squared angle to the mean direction, () in radians squared (C-RADIOv4).

    It is over all ranks' summaries, of which this rank has (N, D).
    """
    device = distributed.device()
    summaries = summaries.to(device, torch.float64)
    mean = distributed.all_reduce(F.normalize(summaries, dim=1).sum(0))
    squares = angles(summaries, mean.expand_as(summaries)).square()
    sums = torch.stack([squares.sum(), squares.new_tensor(len(squares))])
    total, count = distributed.all_reduce(sums)
    return (total / count).float().cpu()


def statistics_fingerprint(teacher: str, facts: Mapping[str, object]) -> str:
    """Identifies an estimate by the teacher's own fingerprint and the facts of its images."""
    text = json.dumps({"teacher": teacher, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load_statistics(path: Path, identity: str) -> TargetStatistics | None:
    """Reads one teacher's statistics; None if the file is missing or has another identity."""
    if not path.exists():
        return None
    try:
        phi_s = load_phi_s(path, identity)
    except TeacherError:
        return None
    side = json.loads(path.with_suffix(".json").read_text())
    return TargetStatistics(phi_s, torch.tensor(side["dispersion"]))


def save_statistics(path: Path, statistics: TargetStatistics, identity: str) -> None:
    """Writes one teacher's statistics, each file whole; PHI-S last, whose file `load` looks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = {"dispersion": float(statistics.dispersion), "fingerprint": identity}
    write_text(path.with_suffix(".json"), json.dumps(side))
    save_phi_s(path, statistics.phi_s, identity)
