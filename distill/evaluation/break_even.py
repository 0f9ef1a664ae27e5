"""The factor from which an upsampler is faster than its encoder at the full size.

Let u be the number of tokens relative to the native size (the factor squared). The projections of
an encoder take a u seconds and its attention b u^2. An upsampler takes c + d u: with tiles, one
pass over the image and one over each of u tiles, (1 + u) t for passes of t seconds (Ranzinger et
al., FeatSharp, 2025, arXiv 2502.16025, section 5). With both laws fitted to measured times, the
times are equal where

    b u^2 + (a - d) u - c = 0.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class BreakEven(NamedTuple):
    """The factor at which an upsampler and its encoder at the full size take the same time.

    Attributes:
        factor: per axis; the upsampler is faster above it. 1 if it always is, None if it never is.
        fit_error: the largest relative error of the two fitted laws at the measured points.
    """

    factor: float | None
    fit_error: float


def break_even(encoder: Mapping[float, float], upsampler: Mapping[float, float]) -> BreakEven:
    """Fits both laws by least squares of the relative errors, and solves for equal times.

    Args:
        encoder: number of tokens, relative to the native size, to seconds; two points or more.
        upsampler: the same for the upsampler, above 1 only: at 1 the image is its own tile.
    """
    (c, d), off_upsampler = _fit(upsampler, (0, 1))
    (a, b), off_encoder = _fit(encoder, (1, 2))
    if b < 1e-9 * a:  # the time of attention is below the noise
        ((a,), off_encoder), b = _fit(encoder, (1,)), 0.0
    tokens = _last_crossing(b, a - d, c)
    factor = None if tokens is None else math.sqrt(max(tokens, 1.0))
    return BreakEven(factor, max(off_encoder, off_upsampler))


def _last_crossing(b: float, p: float, c: float) -> float | None:
    """The u from which b u^2 + p u - c >= 0 holds, for b >= 0; None if there is none."""
    square = p * p + 4 * b * c
    if square < 0:
        return 0.0
    if p > 0:  # of the two forms of the root, the one that does not cancel
        return 2 * c / (p + math.sqrt(square))
    return (math.sqrt(square) - p) / (2 * b) if b > 0 else None


def _fit(points: Mapping[float, float], powers: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The coefficients of the powers of u, and the largest relative error."""
    tokens, seconds = (np.array(list(x), dtype=float) for x in (points.keys(), points.values()))
    relative = np.stack([tokens**power for power in powers], axis=1) / seconds[:, None]
    coefficients = np.linalg.lstsq(relative, np.ones(len(seconds)), rcond=None)[0]
    return coefficients, float(np.abs(relative @ coefficients - 1).max())
