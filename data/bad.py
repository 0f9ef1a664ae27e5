"""Counting bad samples: named in the log, tolerated below a share, fatal above it."""

import logging
import math
from collections.abc import Iterable, Sequence

from data.batch import BadSample
from data.errors import DataError

_LOG = logging.getLogger(__name__)
_NAMED = 5  # samples that a message names


def tolerated(share: float, seen: int) -> float:
    """Bad samples among `seen` that do not yet prove a share above `share`.

    The expectation, three standard deviations of a Poisson count and three more, so that one bad
    sample among the first ten ends nothing, while over long runs the share itself decides. A
    share of 0 tolerates none.
    """
    expected = share * seen
    return expected + 3 * math.sqrt(expected) + 3 if share else 0.0


def check_share(bad: int, seen: int, share: float, examples: Iterable[BadSample]) -> None:
    """Stops a run whose data are worse than it tolerates.

    Raises:
        DataError: more of `seen` samples are bad than `tolerated`; gives counts and first names.
    """
    if bad > tolerated(share, seen):
        names = "\n".join(f"  {describe(sample)}" for sample in list(examples)[:_NAMED])
        raise DataError(
            f"{bad} of {seen} samples are bad, more than data.max_bad_share={share:g} tolerates; "
            f"the first:\n{names}"
        )


def log_bad(samples: Sequence[BadSample], seen: int) -> None:
    """Names the first of the bad samples that were found together."""
    if samples:
        names = "".join(f"\n  {describe(sample)}" for sample in samples[:_NAMED])
        _LOG.warning("%d of %d samples are bad; the first:%s", len(samples), seen, names)


def describe(sample: BadSample) -> str:
    """One line for people."""
    place = f"{sample.shard}/{sample.key}" if sample.key else sample.shard
    return f"{place}: {sample.reason}"


class BadCounter:
    """Counts distinct bad samples of one rank against the distinct samples it has seen.

    Args:
        share: largest share that is tolerated.
        num_samples: samples in the data set; None where it is not known.
    """

    def __init__(self, share: float, num_samples: int | None) -> None:
        self._share = share
        self._num_samples = num_samples
        self._read = 0
        self._bad: dict[tuple[str, str], BadSample] = {}

    @property
    def bad(self) -> list[BadSample]:
        """The distinct bad samples so far, in the order they were met."""
        return list(self._bad.values())

    def add(self, num_read: int, bad: Iterable[BadSample]) -> None:
        """Counts what one micro-batch met; logs the first names, then each doubling.

        Args:
            num_read: samples that were delivered.
            bad: samples that were replaced.

        Raises:
            DataError: the share of bad samples is above the one tolerated.
        """
        self._read += num_read
        for sample in bad:
            if sample[:2] in self._bad:
                continue
            self._bad[sample[:2]] = sample
            count = len(self._bad)
            if count <= _NAMED or count & (count - 1) == 0:
                _LOG.warning("bad sample %d: %s", count, describe(sample))
        seen = self._read + len(self._bad)
        if self._num_samples is not None:
            seen = min(seen, self._num_samples)
        if self._bad:
            check_share(len(self._bad), seen, self._share, self._bad.values())
