"""Bad samples: logged by name, tolerated up to a share of the data, fatal above it."""

import logging
import math
from collections.abc import Iterable, Sequence

from data.batch import BadSample
from data.errors import DataError
from data.text import shown

_LOG = logging.getLogger(__name__)
_NAMED = 5  # samples that a message names


def tolerated(share: float, seen: int) -> float:
    """The largest number of bad samples among `seen` that is consistent with a share of `share`.

    It is the expected number plus three standard deviations of a Poisson count plus three. One bad
    sample in the first ten does not end a run; later, the share decides. A share of 0 allows none.
    """
    expected = share * seen
    return expected + 3 * math.sqrt(expected) + 3 if share else 0.0


def check_share(bad: int, seen: int, share: float, examples: Iterable[BadSample]) -> None:
    """Stops a run that has more bad samples than it tolerates.

    Raises:
        DataError: more of `seen` samples are bad than `tolerated`; with counts and first names.
    """
    if bad > tolerated(share, seen):
        names = "\n".join(f"  {describe(sample)}" for sample in list(examples)[:_NAMED])
        raise DataError(
            f"{bad} of {seen} samples are bad, more than data.max_bad_share={share:g} allows; "
            f"the first:\n{names}"
        )


def log_bad(samples: Sequence[BadSample], seen: int) -> None:
    """Logs how many samples are bad, and the names of the first."""
    if samples:
        names = "".join(f"\n  {describe(sample)}" for sample in samples[:_NAMED])
        _LOG.warning("%d of %d samples are bad; the first:%s", len(samples), seen, names)


def describe(sample: BadSample) -> str:
    """A bad sample's place and reason in one line."""
    place = f"{sample.shard}/{sample.key}" if sample.key else sample.shard
    return f"{shown(place)}: {shown(sample.reason, 500)}"


class BadCounter:
    """Counts the distinct bad samples of one rank among the distinct samples that it has seen.

    Args:
        share: largest share of bad samples that is tolerated.
        num_samples: samples in the dataset; None if unknown.
    """

    def __init__(self, share: float, num_samples: int | None) -> None:
        self._share = share
        self._num_samples = num_samples
        self._read = 0
        self._bad: dict[tuple[str, str], BadSample] = {}

    @property
    def bad(self) -> list[BadSample]:
        """The distinct bad samples so far, in the order in which they were met."""
        return list(self._bad.values())

    def add(self, num_read: int, bad: Iterable[BadSample]) -> None:
        """Counts `num_read` good samples of a micro-batch, and `bad` ones that others replaced.

        Logs the first bad samples by name, and later one at each doubling of their number.

        Raises:
            DataError: the share of bad samples is too large.
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
