"""Pairs each student head with its teacher's target, and weighs and sums their losses.

The heads run on the student's own grid; grids are matched after them. Every head stays in the
graph, with weight zero where its teacher is silent, because ZeRO 2 and 3 reduce wrong gradients
when the ranks, or two micro-batches, use different parameters.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.losses import (
    angle_summary_loss,
    cosine_smooth_l1_spatial_loss,
    cosine_summary_loss,
    match_grids,
    mse_spatial_loss,
)
from teachers.features import Features, FeatureSpec

_SPATIAL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse_spatial_loss,
    "cosine_smooth_l1": cosine_smooth_l1_spatial_loss,
}


class TeacherWeights(BaseModel):
    """How much one teacher's losses count; a teacher with both at zero is not run at all.

    Attributes:
        summary: weight of the summary loss; ignored where the teacher has no summary.
        spatial: weight of the spatial loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: float = Field(1.0, ge=0)
    spatial: float = Field(1.0, ge=0)


class ObjectiveConfig(BaseModel):
    """What the student is asked to match, and how.

    Attributes:
        standardisation: `phi_s` rotates and scales each teacher's map so that every channel has
            variance 1 (PHI-S); `none` leaves it as it is.
        summary: `cosine`, or `angle`: squared angle over the teacher's angular dispersion.
        spatial: `mse`, or `cosine_smooth_l1`.
        weights: teacher name to weights; 1 and 1 where a teacher is not listed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    standardisation: Literal["phi_s", "none"] = "phi_s"
    summary: Literal["cosine", "angle"] = "cosine"
    spatial: Literal["mse", "cosine_smooth_l1"] = "mse"
    weights: dict[str, TeacherWeights] = {}

    def weights_of(self, teacher: str) -> TeacherWeights:
        """The weights of one teacher."""
        return self.weights.get(teacher, TeacherWeights())

    def runs(self, teacher: str, spec: FeatureSpec) -> bool:
        """Whether any loss of this teacher counts."""
        weights = self.weights_of(teacher)
        return weights.spatial > 0 or (weights.summary > 0 and spec.summary_dim is not None)


class LossTerms(NamedTuple):
    """A total to send back, and its parts to look at.

    Attributes:
        total: () with a graph.
        parts: `clip/summary`, `clip/spatial`, ... to unweighted values, () without a graph.
        metrics: other numbers to log, () without a graph.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = MappingProxyType({})

    def scaled(self, share: float) -> Self:
        """All of it times a number."""
        parts, metrics = (
            {name: share * value for name, value in named.items()}
            for named in (self.parts, self.metrics)
        )
        return self._replace(total=share * self.total, parts=parts, metrics=metrics)


class Objective:
    """The loss of a student's heads against its teachers' targets.

    Args:
        config: which losses, and their weights.
        dispersions: teacher name to angular dispersion (); needed by the `angle` loss only.
    """

    def __init__(self, config: ObjectiveConfig, dispersions: Mapping[str, Tensor]) -> None:
        self.config = config
        self.dispersions = dispersions

    def __call__(
        self,
        heads: Mapping[str, Features],
        targets: Mapping[str, Features],
        shares: Mapping[str, float],
    ) -> LossTerms:
        """Computes what one pass adds to the step's loss, in float32.

        Args:
            heads: the student's head for every teacher, summary (B, D_summary) and spatial
                (B, D, h, w).
            targets: what the teachers that are run ask for, standardised, spatial (B, D, h', w').
            shares: teacher to the pass's share of its loss of the whole step; 0 where it is not in
                the pass. Every pass has the same parts, zero where a teacher is silent, so that
                ranks can add them up.
        """
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(iter(heads.values())).spatial.device)
        for name, head in heads.items():
            weights = self.config.weights_of(name)
            target = targets.get(name)
            for part, weight, loss in (
                ("summary", weights.summary, self._summary(name, head, target)),
                ("spatial", weights.spatial, self._spatial(head, target)),
            ):
                if loss is None:
                    continue
                share = 0.0 if target is None else shares.get(name, 0.0)
                total = total + share * weight * loss
                if weight > 0:
                    parts[f"{name}/{part}"] = share * loss.detach()
        return LossTerms(total, parts)

    def _summary(self, name: str, head: Features, target: Features | None) -> Tensor | None:
        if head.summary is None:
            return None
        if target is None or target.summary is None:
            return head.summary.float().sum()
        if self.config.summary == "angle":
            dispersion = self.dispersions[name]
            return angle_summary_loss(head.summary.float(), target.summary, dispersion)
        return cosine_summary_loss(head.summary.float(), target.summary)

    def _spatial(self, head: Features, target: Features | None) -> Tensor:
        if target is None:
            return head.spatial.float().sum()
        loss = _SPATIAL_LOSSES[self.config.spatial]
        return loss(*match_grids(head.spatial.float(), target.spatial))
