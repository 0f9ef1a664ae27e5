"""Depth metrics, masked, from sums of each image: means of images' figures and over all pixels.

Both are called RMSE in the literature, so each figure's name says which it is: DINOv2, DINOv3 and
BTS take the mean of the images' RMSE, multi-task papers pool the pixels. With `aligned_`,
predictions got the scale and the shift that fit each image best (Probe3D), by least squares.
"""

import torch
from torch import Tensor

NUM_SUMS = 6  # pixels, squared errors, relative errors, and pixels within 1.25, 1.25^2, 1.25^3
_BASE = 1.25
ERRORS = ("rmse", "abs_rel")


def depth_sums(prediction: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """What the metrics of one image are made of.

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
    """A prediction with the scale and shift that fit the truth best, in least squares.

    Args:
        prediction: of any shape.
        truth: of the same shape.
        known: bool, the pixels that the fit looks at.

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
    """The metrics of a test set: metres, a ratio, and shares in per cent.

    Args:
        sums: (N, NUM_SUMS), a row an image; those without a pixel do not count.

    Raises:
        RuntimeError: no image has a pixel of known depth.
    """
    sums = sums[sums[:, 0] > 0]
    if not len(sums):
        raise RuntimeError("depth metrics over no pixel of known depth")
    figures = {}
    for name, rows in (("per_image", sums), ("pooled", sums.sum(0, keepdim=True))):
        means = rows[:, 1:] / rows[:, :1]
        figures[f"rmse_{name}"] = float(means[:, 0].sqrt().mean())
        figures[f"abs_rel_{name}"] = float(means[:, 1].mean())
        for k in (1, 2, 3):
            figures[f"d{k}_{name}"] = 100 * float(means[:, 1 + k].mean())
    return figures
