"""Depth metrics against slow float64 counts and the library's."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanAbsolutePercentageError, MeanSquaredError

from distill.benchmarks.dense.depth_scores import aligned, depth_scores, depth_sums


def images() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Predictions, truth and what is known, of images with unequal numbers of known pixels."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for share in (0.9, 0.2, 0.0, 0.5):
        truth = torch.rand(5, 7, generator=generator) * 9 + 0.5
        prediction = truth * (0.5 + torch.rand(5, 7, generator=generator) * 1.2)
        result.append((prediction, truth, torch.rand(5, 7, generator=generator) < share))
    return result


def slow(prediction: Tensor, truth: Tensor, known: Tensor) -> list[list[float]]:
    """Squared error, relative error and hits of each known pixel."""
    pixels = zip(
        prediction.flatten().tolist(),
        truth.flatten().tolist(),
        known.flatten().tolist(),
        strict=True,
    )
    return [
        [(p - t) ** 2, abs(p - t) / t, *(float(max(p / t, t / p) < 1.25**k) for k in (1, 2, 3))]
        for p, t, here in pixels
        if here
    ]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_figures_are_those_of_a_slow_count() -> None:
    counted = [rows for image in images() if (rows := slow(*image))]
    everything = [row for rows in counted for row in rows]
    came = depth_scores(torch.stack([depth_sums(*image) for image in images()]))
    assert len(counted) == 3
    due = {
        "rmse_per_image": mean([math.sqrt(mean([r[0] for r in rows])) for rows in counted]),
        "abs_rel_per_image": mean([mean([r[1] for r in rows]) for rows in counted]),
        "rmse_pooled": math.sqrt(mean([r[0] for r in everything])),
        "abs_rel_pooled": mean([r[1] for r in everything]),
    }
    for k in (1, 2, 3):
        due[f"d{k}_per_image"] = 100 * mean([mean([r[1 + k] for r in rows]) for rows in counted])
        due[f"d{k}_pooled"] = 100 * mean([r[1 + k] for r in everything])
    assert came == pytest.approx(due, rel=1e-6)
    assert next(iter(came)) == "rmse_per_image"


def test_pooled_figures_are_the_librarys() -> None:
    rmse, rel = MeanSquaredError(squared=False), MeanAbsolutePercentageError()
    for prediction, truth, known in images():
        if known.any():
            rmse.update(prediction[known], truth[known])
            rel.update(prediction[known], truth[known])
    came = depth_scores(torch.stack([depth_sums(*image) for image in images()]))
    assert came["rmse_pooled"] == pytest.approx(float(rmse.compute()), rel=1e-6)
    assert came["abs_rel_pooled"] == pytest.approx(float(rel.compute()), rel=1e-6)


def test_rmse_per_image_and_pooled_are_different_figures() -> None:
    """One image is wrong by 1 m, the other, of three times the pixels, by 3 m."""
    known = torch.ones(3, dtype=torch.bool)
    rows = [
        depth_sums(torch.full((1,), 3.0), torch.full((1,), 2.0), known[:1]),
        depth_sums(torch.full((3,), 5.0), torch.full((3,), 2.0), known),
    ]
    came = depth_scores(torch.stack(rows))
    assert came["rmse_per_image"] == pytest.approx(2)
    assert came["rmse_pooled"] == pytest.approx(math.sqrt((1 + 3 * 9) / 4))


def test_a_perfect_prediction_has_no_error() -> None:
    truth = torch.rand(4, 4) + 1
    came = depth_scores(depth_sums(truth, truth, truth > 0)[None])
    assert (came["rmse_pooled"], came["abs_rel_per_image"], came["d1_per_image"]) == (0, 0, 100)


def test_alignment_undoes_any_scale_and_shift_and_looks_at_known_pixels_only() -> None:
    truth = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) + 1
    known = torch.ones_like(truth, dtype=torch.bool)
    known[0] = False
    prediction = (truth - 3) / -2
    prediction[0] = 1e6
    assert torch.allclose(aligned(prediction, truth, known)[1:], truth[1:].double(), atol=1e-6)


def test_alignment_is_the_least_squares_solution() -> None:
    prediction, truth, known = images()[0]
    design = torch.stack([prediction[known], torch.ones_like(prediction[known])], 1).double()
    solution = torch.linalg.lstsq(design, truth[known].double()[:, None]).solution[:, 0]
    due = prediction.double() * solution[0] + solution[1]
    assert torch.allclose(aligned(prediction, truth, known), due)


def test_a_constant_prediction_is_aligned_with_the_mean() -> None:
    _, truth, known = images()[0]
    came = aligned(torch.full_like(truth, 4.0), truth, known)
    assert torch.allclose(came, truth[known].double().mean().expand_as(came))


def test_no_pixel_of_known_depth_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no image has a pixel of known depth"):
        depth_scores(torch.zeros(2, 6))
