"""Divides a batch over ranks, and the ranks over arms."""

from collections.abc import Mapping
from fractions import Fraction

from distill.runtime.errors import RecipeError


def share_out(batch: int, micro: int | None, ranks: int, *, batch_at: str, micro_at: str) -> int:
    """The number of images of one forward pass on one rank.

    Args:
        batch: images of a step, over all ranks that share it.
        micro: the number asked for; None, or a number above a rank's share, is the whole share.
        ranks: number of processes.
        batch_at: the recipe's section that has the batch size, for messages.
        micro_at: the recipe's section that has the size of micro-batches, for messages.

    Raises:
        RecipeError: the batch does not divide; names sizes that do.
    """
    if batch % ranks:
        lower = batch // ranks * ranks
        fits = [size for size in (lower, lower + ranks) if size]
        fewer = max(count for count in range(1, ranks) if batch % count == 0)
        raise RecipeError(
            f"{batch_at}.batch_size: {batch} images do not divide over {ranks} ranks; "
            f"use {' or '.join(map(str, fits))}, or ranks that divide it, such as {fewer}"
        )
    share = batch // ranks
    micro = min(micro or share, share)
    if share % micro:
        fits = [size for size in range(1, share + 1) if share % size == 0]
        nearest = min(fits, key=lambda size: abs(size - micro))
        raise RecipeError(
            f"{micro_at}.micro_batch_size: {micro} does not divide a rank's share of {share} "
            f"images ({batch} over {ranks} ranks); the nearest that does is {nearest}"
        )
    return micro


def place_arms(shares: Mapping[str, int | None], ranks: int) -> dict[str, range]:
    """The ranks of each arm.

    Args:
        shares: arm to its share of the ranks; None for every arm if they have no shares.
        ranks: number of processes; a single one runs all arms, whatever their shares.

    Raises:
        RecipeError: the shares do not divide the ranks; names numbers of ranks that they do.
    """
    own = {name: share for name, share in shares.items() if share is not None}
    if ranks == 1 or not own:
        return dict.fromkeys(shares, range(ranks))
    total = sum(own.values())
    if ranks % total:
        asked = " + ".join(f"{share} ({name})" for name, share in own.items())
        lower = ranks // total * total
        fits = [str(count) for count in (lower, lower + total) if count]
        raise RecipeError(
            f"arms: partitions of {asked} do not fit {ranks} ranks; start {' or '.join(fits)} "
            "ranks, or one, which runs all arms in turn"
        )
    placed, first = {}, 0
    for name, share in own.items():
        placed[name] = range(first, first + share * ranks // total)
        first = placed[name].stop
    return placed


def deal_lanes(shares: Mapping[str, int | None]) -> dict[str, tuple[Fraction, Fraction]]:
    """Where each arm's lanes of a stream begin and end, as shares of all lanes.

    They do not depend on the number of ranks, so that a run can be resumed on another number. The
    shares of the ranks are those of `place_arms`.
    """
    total = sum(share or 0 for share in shares.values())
    lanes, first = {}, Fraction(0)
    for name, share in shares.items():
        last = first + Fraction(share, total) if share else Fraction(1)
        lanes[name] = (first, last)
        first = last if share else Fraction(0)
    return lanes
