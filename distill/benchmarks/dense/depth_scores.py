"""Depth metrics over known pixels: means over images (`_per_image`) and over pixels (`_pooled`).

Both are called RMSE in the literature: DINOv2, DINOv3 and BTS take the mean of the images' RMSE,
multi-task papers pool the pixels. For `aligned_` metrics, the prediction of each image is first
brought to the scale and shift that fit its truth best, by least squares (Probe3D).
"""

import torch
from torch import Tensor

NUM_SUMS = 6  # pixels, squared errors, relative errors, and pixels within 1.25, 1.25^2, 1.25^3
_BASE = 1.25
ERRORS = ("rmse", "abs_rel")


def depth_sums(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """The sums that the metrics of one image are computed from.

    Args:
        prediction: positive metres, of any shape.
        truth: positive metres where it is known, of the same shape.
        known: bool, of the same shape: the pixels that count.

    Returns:
        (NUM_SUMS,) float64.
    """
    p, t = prediction[known].double(), truth[known].double()
    ratio = torch.maximum(p / t, t / p)
    sums = [torch.ones_like(t).sum(), (p - t).square().sum(), ((p - t).abs() / t).sum()]
    return torch.stack(sums + [(ratio < _BASE**k).double().sum() for k in (1, 2, 3)])


def aligned(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """A prediction at the scale and shift that fit the truth best, by least squares.

    Args:
        prediction: of any shape.
        truth: of the same shape.
        known: bool, the pixels that are fitted.

    Returns:
        float64, of the same shape.
    """
    p, t = prediction[known].double(), truth[known].double()
    if not len(p):
        return prediction.double()
    centred = p - p.mean()
    variance = centred.square().sum()
    scale = (centred * t).sum() / variance if variance > 0 else torch.zeros_like(variance)
    return (prediction.double() - p.mean()) * scale + t.mean()


def depth_scores(sums: Tensor) -> dict[str, float]:
    """The metrics of a test set: RMSE in metres, relative error, and shares in per cent.

    Args:
        sums: (N, NUM_SUMS), one row for each image; images without a known pixel do not count.

    Raises:
        RuntimeError: no image has a pixel of known depth.
    """
    sums = sums[sums[:, 0] > 0]
    if not len(sums):
        raise RuntimeError("depth metrics: no image has a pixel of known depth")
    metrics = {}
    for name, rows in (("per_image", sums), ("pooled", sums.sum(0, keepdim=True))):
        means = rows[:, 1:] / rows[:, :1]
        metrics[f"rmse_{name}"] = float(means[:, 0].sqrt().mean())
        metrics[f"abs_rel_{name}"] = float(means[:, 1].mean())
        for k in (1, 2, 3):
            metrics[f"d{k}_{name}"] = 100 * float(means[:, 1 + k].mean())
    return metrics
