"""The loss of the student's heads against its teachers' targets: which losses, and their weights.

The heads run on the student's own grid; grids are matched after them. Every head stays in the
graph, with weight zero if its teacher has no loss, because ZeRO 2 and 3 reduce wrong gradients when
ranks, or two micro-batches, use different parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from distill.objective.losses import (
    angle_summary_loss,
    cosine_smooth_l1_spatial_loss,
    cosine_summary_loss,
    match_grids,
    mse_spatial_loss,
)
from distill.objective.objective_config import ObjectiveConfig
from distill.objective.views import Align, Pair
from distill.objective.weighting import Balancing, kept_shares
from distill.runtime import distributed
from teachers.features import Features

_SPATIAL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse_spatial_loss,
    "cosine_smooth_l1": cosine_smooth_l1_spatial_loss,
}


class LossTerms(NamedTuple):
    """The loss of a micro-batch.

    Attributes:
        total: () with a graph, for the backward pass.
        losses: loss name (`clip/summary`, `clip/spatial`, ...) to unweighted value, () without a
            graph.
        metrics: other numbers to log, () without a graph.
    """

    total: Tensor
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = MappingProxyType({})

    def scaled(self, share: float) -> Self:
        """All values times a number."""
        losses, metrics = (
            {name: share * value for name, value in named.items()}
            for named in (self.losses, self.metrics)
        )
        return self._replace(total=share * self.total, losses=losses, metrics=metrics)


def _common_grid(teacher: str, prediction: Tensor, target: Tensor) -> list[Pair]:
    return [Pair(*match_grids(prediction, target))]


class _Loss(NamedTuple):
    """A `summary` or `spatial` loss of one teacher on one micro-batch, with the recipe's weight.

    Its values are (1,), or (B,) with one an image; None if there is no target.
    """

    teacher: str
    kind: str
    weight: float
    prediction: Tensor
    values: Tensor | None

    @property
    def name(self) -> str:
        """The loss name, as in the metrics."""
        return f"{self.teacher}/{self.kind}"

    def mean(self) -> Tensor:
        """() mean over images, without a graph; zero if there is no target."""
        if self.values is None:
            return torch.zeros((), device=self.prediction.device)
        return self.values.detach().mean()

    def zero(self) -> Tensor:
        """() zero, with the head in its graph."""
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
        """What one micro-batch adds to the step's loss, in float32.

        Args:
            heads: teacher name to the student's head, for every teacher: summary (B, D_summary) or
                None, spatial (B, D, h, w).
            targets: teacher name to target, of the teachers that were run: spatial (B, D, h', w').
            shares: teacher name to the micro-batch's share of that teacher's loss of the whole
                step. A missing one is 0.
            align: pairs the cells of a teacher's map with those of the student's, `Views.pairs`.

        Returns:
            The same loss names for every micro-batch, so that ranks can add them up; the loss of a
            teacher without a target is zero.
        """
        losses = [
            loss
            for name, head in heads.items()
            for loss in self._losses(name, head, targets.get(name), align)
        ]
        counted = {x.name: shares.get(x.teacher, 0.0) * (x.values is not None) for x in losses}
        logged = {x.name: counted[x.name] * x.mean() for x in losses if x.weight}
        factors: Mapping[str, Tensor] = {}
        if self._balancing:
            factors = self._balancing.factors()
            self._balancing.add(logged, counted)
        left_out, metrics = self._left_out(logged)
        kept = self._kept(losses, factors)
        total = torch.zeros((), device=losses[0].prediction.device)
        for loss in losses:
            if loss.values is None or loss.name in left_out:
                total = total + loss.zero()
                continue
            value = (loss.values * kept[loss.teacher] if kept else loss.values).mean()
            scale = counted[loss.name] * loss.weight * factors.get(loss.name, 1.0)
            total = total + scale * value
        return LossTerms(total, logged | dict.fromkeys(left_out, torch.zeros_like(total)), metrics)

    def finish_step(self) -> None:
        """Ends an optimiser step; every rank must call this."""
        if self._balancing:
            self._balancing.finish_step()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, the same on every rank; empty if no option keeps a state."""
        if self._balancing is None and not self.config.tolerated_non_finite:
            return {}
        means = self._balancing.means if self._balancing else {}
        return {"means": means, "num_non_finite": self.num_non_finite}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.num_non_finite = state["num_non_finite"]
        if self._balancing:
            self._balancing.means = dict(state["means"])

    def _losses(
        self, name: str, head: Features, target: Features | None, align: Align
    ) -> Iterator[_Loss]:
        weights = self.config.weights_of(name)
        if head.summary is not None:
            values, prediction = None, head.summary.float()
            if target is not None and target.summary is not None and weights.summary:
                values = self._summary(name, prediction, target.summary)
            yield _Loss(name, "summary", weights.summary, prediction, values)
        values, prediction = None, head.spatial.float()
        if target is not None and weights.spatial:
            values = self._spatial(align(name, prediction, target.spatial))
        yield _Loss(name, "spatial", weights.spatial, prediction, values)

    def _summary(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        pairs = self._split([Pair(prediction, target)])
        if self.config.summary == "angle":
            dispersion = self.dispersions[name]
            return torch.stack([angle_summary_loss(x, y, dispersion) for x, y in pairs])
        return torch.stack([cosine_summary_loss(x, y) for x, y in pairs])

    def _spatial(self, pairs: list[Pair]) -> Tensor:
        loss = _SPATIAL_LOSSES[self.config.spatial]
        # Views that share no cell have the loss 0, the sum of nothing, to stay in the graph.
        values = [loss(x, y) if y.numel() else x.sum() for x, y in self._split(pairs)]
        return torch.stack(values)

    def _split(self, pairs: list[Pair]) -> list[Pair]:
        """One pair for each image if teachers are dropped image by image."""
        if not self.config.dropping:
            return pairs
        return [
            Pair(*one)
            for pair in pairs
            for one in zip(pair.prediction.split(1), pair.target.split(1), strict=True)
        ]

    def _left_out(self, losses: Mapping[str, Tensor]) -> tuple[set[str], dict[str, Tensor]]:
        """Names of losses that are not finite, while the recipe tolerates them; and metrics."""
        if not self.config.tolerated_non_finite:
            return set(), {}
        flags = 1.0 - torch.stack(list(losses.values())).isfinite().float()
        total = self.num_non_finite + int(distributed.all_reduce(flags.clone()).sum())
        if total > self.config.tolerated_non_finite:
            return set(), {}
        self.num_non_finite = total
        metrics = {f"non_finite/{n}": f for n, f in zip(losses, flags.unbind(), strict=True)}
        return {name for name, flag in zip(losses, flags.tolist(), strict=True) if flag}, metrics

    def _kept(self, losses: Sequence[_Loss], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With dropping, name of each teacher with a loss to its weight for each image, (B,)."""
        if not self.config.dropping:
            return {}
        sums: dict[str, Tensor] = {}
        for loss in losses:
            if loss.values is not None:
                value = loss.weight * factors.get(loss.name, 1.0) * loss.values.detach()
                sums[loss.teacher] = sums.get(loss.teacher, 0.0) + value
        if not sums:  # an arm whose teachers all have weight zero
            return {}
        generator = distributed.derived_generator("dropping")
        shares = kept_shares(list(sums.values()), self.config.dropping, generator)
        return dict(zip(sums, shares, strict=True))
