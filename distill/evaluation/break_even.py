"""From which factor on an upsampler costs less than its encoder at the full size.

Both costs follow from what they consist of. With u tokens for each one of the native size (the
factor squared), an encoder's projections cost a u and its attention b u^2; an upsampler costs
c + d u, which with tiles is the image once and u tiles, so (1 + u) t for passes of t seconds
(arXiv 2502.16025, section 5). Fitted to what was measured, they are equal where

    b u^2 + (a - d) u - c = 0.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class BreakEven(NamedTuple):
    """Where an upsampler and its encoder at the full size take the same time.

    Attributes:
        factor: per axis; from here on the upsampler is faster. 1 where it always is, None where it
            never becomes so.
        fit_error: the largest relative error of the two fitted laws at what was measured.
    """

    factor: float | None
    fit_error: float


def break_even(encoder: Mapping[float, float], upsampler: Mapping[float, float]) -> BreakEven:
    """Fits both laws, with equal relative weight for every point, and solves for equality.

    Args:
        encoder: number of tokens, relative to the native size, to seconds; two numbers or more.
        upsampler: the same of the upsampler, above 1 only: at 1 the image is its own tile.
    """
    (c, d), off_upsampler = _fit(upsampler, (0, 1))
    (a, b), off_encoder = _fit(encoder, (1, 2))
    if b < 1e-9 * a:  # its attention is lost in the noise
        ((a,), off_encoder), b = _fit(encoder, (1,)), 0.0
    tokens = _last_crossing(b, a - d, c)
    factor = None if tokens is None else math.sqrt(max(tokens, 1.0))
    return BreakEven(factor, max(off_encoder, off_upsampler))


def _last_crossing(b: float, p: float, c: float) -> float | None:
    """The u from which on b u^2 + p u - c >= 0, for b >= 0; None where there is none."""
    square = p * p + 4 * b * c
    if square < 0:
        return 0.0
    if p > 0:  # of the two forms of the root, the one that does not cancel
        return 2 * c / (p + math.sqrt(square))
    return (math.sqrt(square) - p) / (2 * b) if b > 0 else None


def _fit(points: Mapping[float, float], powers: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """Coefficients of powers, and the largest relative error."""
    tokens, seconds = (np.array(list(x), dtype=float) for x in (points.keys(), points.values()))
    relative = np.stack([tokens**power for power in powers], axis=1) / seconds[:, None]
    coefficients = np.linalg.lstsq(relative, np.ones(len(seconds)), rcond=None)[0]
    return coefficients, float(np.abs(relative @ coefficients - 1).max())
