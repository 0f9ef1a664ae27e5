"""What probes of depth are trained for: both terms compare logarithms where depth is known."""

from torch import Tensor

_MEAN_ONLY_STEPS = 100  # of SigLoss
_MEAN_SHARE = 0.15  # lambda is one minus it (Eigen et al. 2014; AdaBins)
_SCALES = 4  # of the term of gradients
_EPS = 1e-3  # metres, in logarithms


def sig_loss(prediction: Tensor, truth: Tensor, known: Tensor, step: int) -> Tensor:
    """The scale-invariant error of logarithms, which is lenient with a common factor.

    With g = log prediction - log truth: sqrt(var(g) + 0.15 mean(g)^2), and during the first 100
    steps the second term alone, which brings the scale about right.

    Args:
        prediction: metres, of any shape.
        truth: metres where it is known, of the same shape.
        known: bool, of the same shape.
        step: 0-based.
    """
    if not known.any():
        return prediction.sum() * 0
    g = _log(prediction[known]) - _log(truth[known])
    total = _MEAN_SHARE * g.mean().square()
    if step >= _MEAN_ONLY_STEPS:
        total = total + g.var(correction=0)
    return (total + 1e-12).sqrt()  # whose slope at zero is infinite


def gradient_loss(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """How far steps between neighbours differ, in logarithms, at four scales: edges stay sharp.

    The multi-scale gradient term of MegaDepth (Li and Snavely 2018, arXiv 1804.00607), which
    Probe3D adds to SigLoss. Of each scale, which has every 1st, 2nd, 4th or 8th pixel, it is the
    sum of |g - g'| over neighbours along both axes, both known, by the number of known pixels;
    g = log prediction - log truth.

    Args:
        prediction: metres, (..., H, W).
        truth: metres where it is known, of the same shape.
        known: bool, of the same shape.
    """
    # Where depth is unknown, pixels are set before the logarithm: its slope there could be NaN.
    g = _log(prediction.where(known, 1.0)) - _log(truth.where(known, 1.0))
    total = prediction.sum() * 0
    for scale in range(_SCALES):
        places = (..., slice(None, None, 2**scale), slice(None, None, 2**scale))
        part, counts = g[places], known[places]
        steps = [(part.diff(dim=axis).abs() * _pairs(counts, axis)).sum() for axis in (-2, -1)]
        total = total + sum(steps) / counts.sum().clamp(min=1)
    return total


def _log(depth: Tensor) -> Tensor:
    return (depth + _EPS).log()


def _pairs(known: Tensor, axis: int) -> Tensor:
    """Where a pixel and the next one along an axis are known."""
    length = known.shape[axis]
    return known.narrow(axis, 1, length - 1) & known.narrow(axis, 0, length - 1)
