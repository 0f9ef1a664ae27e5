"""Arms: images of one size with the teachers that see them, and the ranks that run them.

An optimiser step has one batch of images for each arm. On few ranks the arms run one after the
other and their gradients add up; on many, each may have ranks of its own (the rank partitions of
AM-RADIO and RADIOv2.5). Both give the same gradient: a teacher's loss is the weighted mean over all
images that it sees in the step, whichever arm they are in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt

from data.layout import StepLayout, SubBatch
from distill.runtime.errors import RecipeError
from distill.targets.routes import RouteChoice
from distill.training.rank_shares import deal_lanes, place_arms, share_out
from distill.training.resolution import ResolutionSchedule, SizeConfig
from teachers.config import StrictConfig


class ArmConfig(StrictConfig):
    """One arm.

    Attributes:
        resolution: of the student's input, as in `run.resolution`.
        batch_size: images of one optimiser step, over all ranks that run the arm.
        micro_batch_size: images of one forward pass on one rank; None, or a number above a rank's
            share, is the whole share.
        teachers: names of those that see the arm's images; None for all.
        weight: of one image of the arm in a loss, relative to images of other arms.
        ranks: the arm's share of the ranks, which then run no other arm: shares of 1 and 3 are a
            quarter and three quarters of the ranks. Either all arms have a share or none. Without
            shares, and in a single process, every rank runs all arms one after the other.
        routes: teacher name to route, over `targets.routes`.
    """

    resolution: ResolutionSchedule
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    teachers: tuple[str, ...] | None = Field(None, min_length=1)
    weight: PositiveFloat = 1.0
    ranks: PositiveInt | None = None
    routes: dict[str, RouteChoice] = {}


class MicroBatch(NamedTuple):
    """The images of one forward and backward pass of one rank, and how much they count.

    Attributes:
        arm: its name; empty in a recipe without arms.
        first: place of its first image in the step, over all ranks.
        images: their number.
        share: of a loss over all images of the step; the shares of all micro-batches of all ranks
            sum to 1.
        shares: teacher name to the share of that teacher's loss; those of all micro-batches sum
            to 1.
        arm_share: of a loss over the images of the arm alone.
        routes: teacher name to route, for the teachers of the arm.
        keys: of the images, once they are read.
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
    """The micro-batches of every rank in every optimiser step, as a pure function of its number.

    Args:
        arms: name to arm; a recipe without arms has one with an empty name, from its `run`.
        teachers: names of all teachers.
        seed: of the run.
        ranks: number of processes.
        margin: pixels by which images exceed the student's input, along both axes.

    Raises:
        RecipeError: a batch or the ranks do not divide; names numbers that do.
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
        every = {n: [self._sub_batch(n, s) for s in a.resolution.root] for n, a in arms.items()}
        _require_equal_micro_batches(every)
        listed = [each for of_arm in every.values() for each in of_arm]
        self.layout = StepLayout(self._sub_batches, listed, _identity(self.arms))

    @property
    def partitions(self) -> list[range]:
        """The ranks of each arm, or one range of all ranks if arms have no shares."""
        return list(dict.fromkeys(self._placed.values()))

    def teachers_of(self, rank: int) -> set[str]:
        """The names of the teachers that a rank runs."""
        mine = [n for n in self.arms if rank in self._placed[n]]
        return {teacher for name in mine for teacher in self._teachers[name]}

    def images_of(self, step: int) -> dict[str, int]:
        """Teacher name to the number of images that it sees in a step, over all ranks."""
        seen: dict[str, int] = {}
        for name, sub_batch in zip(self.arms, self._sub_batches(step), strict=True):
            for teacher in self._teachers[name]:
                seen[teacher] = seen.get(teacher, 0) + sub_batch.batch_size
        return seen

    def micro_batches(self, rank: int, step: int) -> list[MicroBatch]:
        """The micro-batches of a rank in a step, in the order in which they run."""
        sub_batches = dict(zip(self.arms, self._sub_batches(step), strict=True))
        weights = {n: self.arms[n].weight * each.batch_size for n, each in sub_batches.items()}
        totals: dict[str, float] = {}
        for name, weight in weights.items():
            for teacher in self._teachers[name]:
                totals[teacher] = totals.get(teacher, 0.0) + weight
        found = []
        for name, sub_batch in sub_batches.items():
            if rank not in sub_batch.ranks:
                continue
            of_arm = sub_batch.micro_batch_size / sub_batch.batch_size
            one = MicroBatch(
                arm=name,
                first=0,
                images=sub_batch.micro_batch_size,
                share=of_arm * weights[name] / sum(weights.values()),
                shares={t: of_arm * weights[name] / totals[t] for t in self._teachers[name]},
                arm_share=of_arm,
                routes={t: self.arms[name].routes.get(t, "auto") for t in self._teachers[name]},
            )
            found += [one] * sub_batch.micro_batches
        places = self.layout.slices(rank, step, 0)
        return [one._replace(first=p.first) for one, p in zip(found, places, strict=True)]

    def _sub_batches(self, step: int) -> list[SubBatch]:
        return [
            self._sub_batch(name, arm.resolution.draw(step, self._seed, name))
            for name, arm in self.arms.items()
        ]

    def _sub_batch(self, name: str, size: SizeConfig) -> SubBatch:
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
    """The path of an arm in its recipe, for messages."""
    return f"arms.{arm}" if arm else "run"


def _require_equal_micro_batches(sub_batches: Mapping[str, Sequence[SubBatch]]) -> None:
    """Arms with ranks of their own need equally many: all ranks join in every backward pass."""
    found = [(name, each) for name, of_arm in sub_batches.items() for each in of_arm]
    if len({each.ranks for _, each in found}) == 1:
        return
    if len({each.micro_batches for _, each in found}) > 1:
        counts = ", ".join(
            f"{place_of(name)} {each.micro_batches} ({each.batch_size} images at "
            f"{each.resolution[0]} x {each.resolution[1]} px over {len(each.ranks)} ranks, "
            f"{each.micro_batch_size} a micro-batch)"
            for name, each in found
        )
        raise RecipeError(
            f"arms: with ranks of their own they need as many micro-batches a step, got "
            f"{counts}; change their micro_batch_size until they agree"
        )


def _identity(arms: Mapping[str, ArmConfig]) -> dict[str, Any]:
    """What decides how many samples of which size a step reads; kept in checkpoints."""
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
