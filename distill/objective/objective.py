"""Pairs each student head with its teacher's target, and weighs and sums their losses.

The heads run on the student's own grid; grids are matched after them. Every head stays in the
graph, with weight zero where its teacher is silent, because ZeRO 2 and 3 reduce wrong gradients
when the ranks, or two micro-batches, use different parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from torch import Tensor

from distill.objective.losses import (
    angle_summary_loss,
    cosine_smooth_l1_spatial_loss,
    cosine_summary_loss,
    match_grids,
    mse_spatial_loss,
)
from distill.objective.mesa import MesaConfig
from distill.objective.views import EquivarianceConfig, Pair
from distill.objective.weighting import Balancing, BalancingConfig, kept_shares
from distill.runtime import distributed
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

    @property
    def count(self) -> bool:
        """Whether one of them counts."""
        return self.summary > 0 or self.spatial > 0


class ObjectiveConfig(BaseModel):
    """What the student is asked to match, and how.

    Attributes:
        standardisation: `phi_s` rotates and scales each teacher's map so that every channel has
            variance 1 (PHI-S); `none` leaves it as it is.
        summary: `cosine`, or `angle`: squared angle over the teacher's angular dispersion.
        spatial: `mse`, or `cosine_smooth_l1`.
        weights: teacher name to weights; 1 and 1 where a teacher is not listed.
        equivariance: how the views of student and teachers differ; None: all see the same.
        mesa: agreement with the moving average of the student; None for none.
        dropping: probability that a teacher is silent for an image, see `dropping.py`; 0 for never.
        balancing: divides each loss by its running mean; None does not.
        tolerated_non_finite: losses of a teacher on a micro-batch, over the whole run and all
            ranks, that may be NaN or infinite: they are left out and reported. The next one, like
            the first where this is 0, ends the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    standardisation: Literal["phi_s", "none"] = "phi_s"
    summary: Literal["cosine", "angle"] = "cosine"
    spatial: Literal["mse", "cosine_smooth_l1"] = "mse"
    weights: dict[str, TeacherWeights] = {}
    equivariance: EquivarianceConfig | None = None
    mesa: MesaConfig | None = None
    dropping: float = Field(0.0, ge=0, lt=1)
    balancing: BalancingConfig | None = None
    tolerated_non_finite: NonNegativeInt = 0

    def weights_of(self, teacher: str) -> TeacherWeights:
        """The weights of one teacher."""
        return self.weights.get(teacher, TeacherWeights())

    def runs(self, teacher: str, spec: FeatureSpec) -> bool:
        """Whether any loss of this teacher counts."""
        weights = self.weights_of(teacher)
        return weights.spatial > 0 or (weights.summary > 0 and spec.summary_dim is not None)


Align = Callable[[str, Tensor, Tensor], list[Pair]]


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


def _common_grid(reader: str, prediction: Tensor, target: Tensor) -> list[Pair]:
    return [Pair(*match_grids(prediction, target))]


class _Term(NamedTuple):
    """One loss of one teacher on one micro-batch.

    Attributes:
        teacher: its name.
        part: `summary` or `spatial`.
        weight: the recipe's.
        prediction: the head's.
        losses: (1,), or (B,) with one an image; None where the teacher is silent.
    """

    teacher: str
    part: str
    weight: float
    prediction: Tensor
    losses: Tensor | None

    @property
    def name(self) -> str:
        """As in the metrics."""
        return f"{self.teacher}/{self.part}"

    def value(self) -> Tensor:
        """(), the mean over images without a graph; zero where the teacher is silent."""
        if self.losses is None:
            return torch.zeros((), device=self.prediction.device)
        return self.losses.detach().mean()

    def nothing(self) -> Tensor:
        """(), zero, with the head in its graph."""
        return 0.0 * self.prediction.sum()


class Objective:
    """The loss of a student's heads against its teachers' targets.

    Args:
        config: which losses, and their weights.
        dispersions: teacher name to angular dispersion (); needed by the `angle` loss only.

    Attributes:
        num_non_finite: losses, over all ranks, that were not finite and have been left out.
    """

    def __init__(self, config: ObjectiveConfig, dispersions: Mapping[str, Tensor]) -> None:
        self.config = config
        self.dispersions = dispersions
        self.num_non_finite = 0
        self._balancing = Balancing(config.balancing) if config.balancing else None

    def __call__(
        self,
        heads: Mapping[str, Features],
        targets: Mapping[str, Features],
        shares: Mapping[str, float],
        align: Align = _common_grid,
    ) -> LossTerms:
        """Computes what one pass adds to the step's loss, in float32.

        Args:
            heads: the student's head for every teacher, summary (B, D_summary) and spatial
                (B, D, h, w).
            targets: what the teachers that are run ask for, standardised, spatial (B, D, h', w').
            shares: teacher to the pass's share of its loss of the whole step; 0 where it is not in
                the pass. Every pass has the same parts, zero where a teacher is silent, so that
                ranks can add them up.
            align: finds where a teacher's map and the student's show the same, `Views.pairs`.
        """
        terms = [
            term
            for name, head in heads.items()
            for term in self._terms(name, head, targets.get(name), align)
        ]
        counted = {t.name: shares.get(t.teacher, 0.0) * (t.losses is not None) for t in terms}
        parts = {t.name: counted[t.name] * t.value() for t in terms if t.weight}
        factors: Mapping[str, Tensor] = {}
        if self._balancing:
            factors = self._balancing.factors()
            self._balancing.add(parts, counted)
        left_out, metrics = self._left_out(parts)
        kept = self._kept(terms, factors)
        total = torch.zeros((), device=terms[0].prediction.device)
        for term in terms:
            if term.losses is None or term.name in left_out:
                total = total + term.nothing()
                continue
            loss = (term.losses * kept[term.teacher] if kept else term.losses).mean()
            scale = counted[term.name] * term.weight * factors.get(term.name, 1.0)
            total = total + scale * loss
        return LossTerms(total, parts | dict.fromkeys(left_out, torch.zeros_like(total)), metrics)

    def finish_step(self) -> None:
        """Called by every rank between two optimiser steps."""
        if self._balancing:
            self._balancing.finish_step()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, the same on every rank; empty where no option keeps any."""
        if self._balancing is None and not self.config.tolerated_non_finite:
            return {}
        means = self._balancing.means if self._balancing else {}
        return {"means": means, "num_non_finite": self.num_non_finite}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` returned."""
        self.num_non_finite = state["num_non_finite"]
        if self._balancing:
            self._balancing.means = dict(state["means"])

    def _terms(
        self, name: str, head: Features, target: Features | None, align: Align
    ) -> Iterator[_Term]:
        weights = self.config.weights_of(name)
        if head.summary is not None:
            losses, prediction = None, head.summary.float()
            if target is not None and target.summary is not None and weights.summary:
                losses = self._summary(name, prediction, target.summary)
            yield _Term(name, "summary", weights.summary, prediction, losses)
        losses, prediction = None, head.spatial.float()
        if target is not None and weights.spatial:
            losses = self._spatial(align(name, prediction, target.spatial))
        yield _Term(name, "spatial", weights.spatial, prediction, losses)

    def _summary(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        pairs = self._split([Pair(prediction, target)])
        if self.config.summary == "angle":
            dispersion = self.dispersions[name]
            return torch.stack([angle_summary_loss(x, y, dispersion) for x, y in pairs])
        return torch.stack([cosine_summary_loss(x, y) for x, y in pairs])

    def _spatial(self, pairs: list[Pair]) -> Tensor:
        loss = _SPATIAL_LOSSES[self.config.spatial]
        # Views of an image that share no cell have nothing to say, and stay in the graph.
        losses = [loss(x, y) if y.numel() else x.sum() for x, y in self._split(pairs)]
        return torch.stack(losses)

    def _split(self, pairs: list[Pair]) -> list[Pair]:
        """A pair an image, where teachers are dropped image by image."""
        if not self.config.dropping:
            return pairs
        return [
            Pair(*one)
            for pair in pairs
            for one in zip(pair.prediction.split(1), pair.target.split(1), strict=True)
        ]

    def _left_out(self, parts: Mapping[str, Tensor]) -> tuple[set[str], dict[str, Tensor]]:
        """Losses of this pass that are not finite, while the recipe still allows for them."""
        if not self.config.tolerated_non_finite:
            return set(), {}
        flags = 1.0 - torch.stack(list(parts.values())).isfinite().float()
        total = self.num_non_finite + int(distributed.all_reduce(flags.clone()).sum())
        if total > self.config.tolerated_non_finite:
            return set(), {}
        self.num_non_finite = total
        metrics = {f"non_finite/{n}": f for n, f in zip(parts, flags.unbind(), strict=True)}
        return {name for name, flag in zip(parts, flags.tolist(), strict=True) if flag}, metrics

    def _kept(self, terms: Sequence[_Term], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each teacher that speaks, how much it counts for each image, (B,)."""
        if not self.config.dropping:
            return {}
        losses: dict[str, Tensor] = {}
        for term in terms:
            if term.losses is not None:
                value = term.weight * factors.get(term.name, 1.0) * term.losses.detach()
                losses[term.teacher] = losses.get(term.teacher, 0.0) + value
        if not losses:  # an arm whose teachers all have weight zero
            return {}
        generator = distributed.derived_generator("dropping")
        shares = kept_shares(list(losses.values()), self.config.dropping, generator)
        return dict(zip(losses, shares, strict=True))
