"""Arms: what the teachers see together in one optimiser step, and which ranks run it.

An arm is some images at one size with some teachers; a step has one image batch of each arm. On
few ranks the arms follow each other and their gradients add up; on many, each may have ranks of
its own (rank partitions of AM-RADIO and RADIOv2.5). Both give the same gradient: the loss of a
teacher is the weighted mean over the images that it sees in the step, whichever arm they are in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from data.layout import StepLayout, SubBatch
from distill.runtime.errors import RecipeError
from distill.targets.routes import RouteChoice
from distill.training.rank_shares import deal_lanes, place_arms, share_out
from distill.training.resolution import ResolutionSchedule, SizeConfig


class ArmConfig(BaseModel):
    """One arm.

    Attributes:
        resolution: of the student's input, as in `run.resolution`.
        batch_size: images of one optimiser step, over all ranks that run the arm.
        micro_batch_size: images of one forward pass on one rank, where its share is larger; None
            takes the whole share.
        teachers: names of those that see the arm's images; None for all.
        weight: how much one image of the arm counts, against those of other arms.
        ranks: the arm's share of the ranks, which then run nothing else: 1 and 3 give it every
            fourth, or three of four. All arms have one, or none; without, every rank runs all
            arms one after the other, as a single process does in any case.
        routes: teacher to route, over `targets.routes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: ResolutionSchedule
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    teachers: tuple[str, ...] | None = Field(None, min_length=1)
    weight: PositiveFloat = 1.0
    ranks: PositiveInt | None = None
    routes: dict[str, RouteChoice] = {}


class MicroBatch(NamedTuple):
    """One forward and backward pass of one rank: its images, routes and shares of the losses.

    Attributes:
        arm: its name; empty where a recipe has no arms.
        first: place of its first image among those of the step, over all ranks.
        images: how many.
        share: of a loss that every image of the step takes part in; those of all micro-batches
            of all ranks sum to 1.
        shares: teacher to the micro-batch's share of its loss; those of all micro-batches sum to 1.
        arm_share: the micro-batch's share of its own arm's images.
        routes: teacher to route, for the teachers of the arm.
        keys: of its images, once they are read.
    """

    arm: str
    first: int
    images: int
    share: float
    shares: Mapping[str, float]
    arm_share: float
    routes: Mapping[str, RouteChoice]
    keys: Sequence[str] = ()


class StepPlan:
    """What every rank does in every optimiser step: a pure function of the step's number.

    Args:
        arms: name to arm; a single one may have an empty name, and is then the recipe's `run`.
        teachers: the names of all teachers.
        seed: of the run.
        ranks: number of processes.
        margin: pixels by which images are larger than the student's, along both axes.

    Raises:
        RecipeError: a batch or the ranks do not divide; says what would.
    """

    def __init__(
        self,
        arms: Mapping[str, ArmConfig],
        teachers: Sequence[str],
        *,
        seed: int,
        ranks: int,
        margin: int = 0,
    ) -> None:
        self.arms = dict(arms)
        self._seed, self._margin = seed, margin
        self._teachers = {name: arm.teachers or tuple(teachers) for name, arm in arms.items()}
        self._placed = place_arms({name: arm.ranks for name, arm in arms.items()}, ranks)
        self._lanes = deal_lanes({name: arm.ranks for name, arm in arms.items()})
        parts = {n: [self._part(n, s) for s in arm.resolution.root] for n, arm in arms.items()}
        _require_equal_micro_batches(self.arms, parts)
        every = [part for arm in parts.values() for part in arm]
        self.layout = StepLayout(self._parts, every, _identity(self.arms))

    @property
    def partitions(self) -> list[range]:
        """The ranks that run the same arms, part by part; all in one where arms have none."""
        return list(dict.fromkeys(self._placed.values()))

    def teachers_of(self, rank: int) -> set[str]:
        """The teachers that a rank runs."""
        mine = [n for n in self.arms if rank in self._placed[n]]
        return {teacher for name in mine for teacher in self._teachers[name]}

    def images_of(self, step: int) -> dict[str, int]:
        """Teacher to the images that it sees in a step, over all ranks."""
        seen: dict[str, int] = {}
        for name, part in zip(self.arms, self._parts(step), strict=True):
            for teacher in self._teachers[name]:
                seen[teacher] = seen.get(teacher, 0) + part.batch_size
        return seen

    def micro_batches(self, rank: int, step: int) -> list[MicroBatch]:
        """The micro-batches of a rank in a step, in the order in which they run."""
        parts = dict(zip(self.arms, self._parts(step), strict=True))
        weights = {n: self.arms[n].weight * part.batch_size for n, part in parts.items()}
        totals: dict[str, float] = {}
        for name, weight in weights.items():
            for teacher in self._teachers[name]:
                totals[teacher] = totals.get(teacher, 0.0) + weight
        found = []
        for name, part in parts.items():
            if rank not in part.ranks:
                continue
            of_arm = part.micro_batch_size / part.batch_size
            one = MicroBatch(
                arm=name,
                first=0,
                images=part.micro_batch_size,
                share=of_arm * weights[name] / sum(weights.values()),
                shares={t: of_arm * weights[name] / totals[t] for t in self._teachers[name]},
                arm_share=of_arm,
                routes={t: self.arms[name].routes.get(t, "auto") for t in self._teachers[name]},
            )
            found += [one] * part.micro_batches
        places = self.layout.slices(rank, step, 0)
        return [one._replace(first=p.first) for one, p in zip(found, places, strict=True)]

    def _parts(self, step: int) -> list[SubBatch]:
        return [
            self._part(name, arm.resolution.draw(step, self._seed, name))
            for name, arm in self.arms.items()
        ]

    def _part(self, name: str, size: SizeConfig) -> SubBatch:
        arm, ranks = self.arms[name], self._placed[name]
        own = f"{place_of(name)}.resolution.{arm.resolution.root.index(size)}"
        batch = size.batch_size or arm.batch_size
        micro = share_out(
            batch,
            size.micro_batch_size or arm.micro_batch_size,
            len(ranks),
            batch_at=own if size.batch_size else place_of(name),
            micro_at=own if size.micro_batch_size else place_of(name),
        )
        return SubBatch(
            resolution=(size.size[0] + self._margin, size.size[1] + self._margin),
            batch_size=batch,
            micro_batch_size=micro,
            ranks=ranks,
            lanes=self._lanes[name],
        )


def place_of(arm: str) -> str:
    """The path of an arm in its recipe."""
    return f"arms.{arm}" if arm else "run"


def _require_equal_micro_batches(
    arms: Mapping[str, ArmConfig], parts: Mapping[str, Sequence[SubBatch]]
) -> None:
    """Ranks meet in every backward pass, so those of different arms must have as many."""
    found = [(name, part) for name, of_arm in parts.items() for part in of_arm]
    if len({part.ranks for _, part in found}) == 1:
        return
    if len({part.micro_batches for _, part in found}) > 1:
        said = ", ".join(
            f"{place_of(name)} {part.micro_batches} ({part.batch_size} images at "
            f"{part.resolution[0]} x {part.resolution[1]} px over {len(part.ranks)} ranks, "
            f"{part.micro_batch_size} a pass)"
            for name, part in found
        )
        raise RecipeError(
            f"arms: with ranks of their own they need as many passes a step: {said}; change "
            "their micro_batch_size until they agree"
        )


def _identity(arms: Mapping[str, ArmConfig]) -> dict[str, Any]:
    """What decides how many samples of which size a step reads."""
    only = arms.get("")
    if only is not None and only.resolution.fixed:
        return {"resolution": list(only.resolution.fixed), "batch_size": only.batch_size}
    facts = {
        name: {
            "ranks": arm.ranks,
            "sizes": [
                size.model_dump(mode="json", exclude={"micro_batch_size"})
                | {"batch_size": size.batch_size or arm.batch_size}
                for size in arm.resolution.root
            ],
        }
        for name, arm in arms.items()
    }
    return {"arms": facts}
