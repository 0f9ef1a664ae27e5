"""A weighted mixture of endless sources, as a pure function of the position."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.seeds import Purpose, permutation

_BLOCK = 1024


class Mixture:
    """Maps a position in the mixture to a source and to the number of a sample in that source.

    Source 0 takes floor(n p) of the first n positions, with its exact share p; the others split the
    rest in the same way. So each count differs from its share by less than the number of sources.
    The pattern is shuffled in blocks of 1024, so that no source is tied to a rank or place.

    Args:
        weights: positive, one for each source; only their proportions matter.
        seed: of the run.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        self._shares = [exact[i] / sum(exact[i:]) for i in range(len(exact))]
        self._total_shares = [share / sum(exact) for share in exact]
        self._seed = seed
        self._recent: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def counts(self, num: int) -> list[int]:
        """Samples of each source among the first `num`, a multiple of the block size."""
        counts = []
        for share in self._shares:
            counts.append(num * share.numerator // share.denominator)
            num -= counts[-1]
        return counts

    def positions_for(self, wanted: Sequence[int]) -> int:
        """Positions, from the first, that contain so many samples of each source or more."""
        if len(wanted) == 1:
            return wanted[0]
        pairs = zip(wanted, self._total_shares, strict=True)
        num = max(int(count / share) for count, share in pairs) // _BLOCK * _BLOCK
        while any(have < want for have, want in zip(self.counts(num), wanted, strict=True)):
            num += _BLOCK
        return num

    def locate(self, position: int) -> tuple[int, int]:
        """The source at a global position, and the number of the sample in that source."""
        if len(self._shares) == 1:
            return 0, position
        sources, ordinals = self._block(position // _BLOCK)
        place = position % _BLOCK
        return int(sources[place]), int(ordinals[place])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._recent:
            self._recent = {block: self._shuffle(block)}
        return self._recent[block]

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        pattern = np.array([self._regular(block * _BLOCK + i) for i in range(_BLOCK)])
        sources = pattern[permutation(_BLOCK, self._seed, Purpose.MIXTURE, block)]
        ordinals = np.empty(_BLOCK, np.int64)
        for source, base in enumerate(self.counts(block * _BLOCK)):
            mine = np.flatnonzero(sources == source)
            ordinals[mine] = base + np.arange(len(mine))
        return sources, ordinals

    def _regular(self, place: int) -> int:
        for source, share in enumerate(self._shares):
            before = place * share.numerator // share.denominator
            if (place + 1) * share.numerator // share.denominator > before:
                return source
            place -= before
        raise AssertionError("the last source takes all remaining positions")
