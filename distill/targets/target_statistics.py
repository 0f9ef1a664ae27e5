"""One pass over images, on all ranks, that fits what standardises each teacher's targets.

For the maps: mean and covariance in float64, merged exactly over the ranks (Chan et al. 1983,
equation 2.1), from which PHI-S follows. For the summaries: the mean direction and the angular
dispersion around it (C-RADIOv4). Written beside the run under a fingerprint of the teacher, its
weights, its upsampler, the data and the sizes, so that it is estimated once.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import write_text
from distill.objective.losses import angles
from distill.runtime import distributed
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s, load_phi_s, save_phi_s

IN_CHECKPOINT = "checkpoint"  # in the place of a fingerprint


class TargetStatistics(NamedTuple):
    """What standardises one teacher's targets.

    Attributes:
        phi_s: the fitted map standardiser.
        dispersion: () mean squared angle of the summaries to their mean direction; 1 where the
            teacher has no summary.
    """

    phi_s: PhiS
    dispersion: Tensor


class StatisticsPass:
    """Collects one teacher's statistics on one rank, then merges those of all ranks.

    Args:
        spec: the teacher's. A rank that shows it nothing merges what the others saw.
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

    def finish(self) -> TargetStatistics:
        """Merges over the ranks and fits; every rank must call this, and gets the same."""
        merged = merge_over_ranks(self._spatial)
        dispersion = torch.ones(())
        if self._summary_dim is not None and distributed.any_rank(bool(self._summaries)):
            none = torch.empty(0, self._summary_dim)
            dispersion = angular_dispersion(torch.cat([none, *self._summaries]))
        return TargetStatistics(fit_phi_s(merged), dispersion)


def merge_over_ranks(statistics: FeatureStatistics) -> FeatureStatistics:
    """The statistics of all ranks' samples together: two sums, whatever the number of ranks."""
    if distributed.world_size() == 1:
        return statistics
    total = distributed.all_reduce(statistics.count.clone())
    mean = distributed.all_reduce(statistics.count * statistics.mean) / total
    shift = statistics.mean - mean
    between = statistics.count * torch.outer(shift, shift)
    return FeatureStatistics(total, mean, distributed.all_reduce(statistics.scatter + between))


def angular_dispersion(summaries: Tensor) -> Tensor:
    """Mean squared angle to the mean direction, over all ranks' summaries (C-RADIOv4).

    Args:
        summaries: (N, D) this rank's.

    Returns:
        () float32, in radians squared.
    """
    device = distributed.device()
    summaries = summaries.to(device, torch.float64)
    mean = distributed.all_reduce(F.normalize(summaries, dim=1).sum(0))
    squares = angles(summaries, mean.expand_as(summaries)).square()
    sums = torch.stack([squares.sum(), squares.new_tensor(len(squares))])
    total, count = distributed.all_reduce(sums)
    return (total / count).float().cpu()


def statistics_fingerprint(teacher: str, facts: Mapping[str, object]) -> str:
    """Identifies an estimate: the teacher's own fingerprint, and what it was shown."""
    text = json.dumps({"teacher": teacher, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load_statistics(path: Path, fingerprint: str) -> TargetStatistics | None:
    """Reads an estimate; None where there is none, or it is another's."""
    if not path.exists():
        return None
    try:
        phi_s = load_phi_s(path, fingerprint)
    except TeacherError:
        return None
    side = json.loads(path.with_suffix(".json").read_text())
    return TargetStatistics(phi_s, torch.tensor(side["dispersion"]))


def save_statistics(path: Path, statistics: TargetStatistics, fingerprint: str) -> None:
    """Writes an estimate; the map's file comes last and under its final name at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = {"dispersion": float(statistics.dispersion), "fingerprint": fingerprint}
    write_text(path.with_suffix(".json"), json.dumps(side))
    save_phi_s(path, statistics.phi_s, fingerprint)
