"""The largest F measure, against a slow count."""

import pytest
import torch
from torch import Tensor

from distill.benchmarks.dense.counters import SaliencyCounter


def counter() -> SaliencyCounter:
    return SaliencyCounter(torch.device("cpu"))


def slow(probabilities: Tensor, labels: Tensor) -> float:
    """Threshold by threshold, pixel by pixel."""
    pairs = [
        (p, int(t)) for p, t in zip(probabilities.flatten().tolist(), labels.flatten(), strict=True)
    ]
    best = 0.0
    for threshold in torch.linspace(0, 1, 255).tolist():
        hits = sum(p >= threshold and t == 1 for p, t in pairs)
        false = sum(p >= threshold and t == 0 for p, t in pairs)
        missed = sum(p < threshold and t == 1 for p, t in pairs)
        best = max(best, 2 * hits / max(1, 2 * hits + false + missed))
    return 100 * best


def some_pixels(seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities that know something of the labels, a fifth of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (2, 9, 11), generator=generator)
    probabilities = (labels + 1.5 * torch.rand(labels.shape, generator=generator)) / 2.5
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return probabilities, labels


@pytest.mark.parametrize("seed", range(3))
def test_max_f_is_the_slow_count(seed: int) -> None:
    probabilities, labels = some_pixels(seed)
    metric = counter()
    metric.add(probabilities, labels)
    assert metric.metrics()["max_f"] == pytest.approx(slow(probabilities, labels), abs=1e-4)
    assert 60 < metric.metrics()["max_f"] < 99


def test_batches_of_any_size_pool_their_pixels() -> None:
    parts = [some_pixels(0), some_pixels(5)]
    metric = counter()
    metric.add(*parts[0])
    metric.add(parts[1][0][:1, :4], parts[1][1][:1, :4])
    together = [torch.cat([parts[0][i].flatten(), parts[1][i][:1, :4].flatten()]) for i in range(2)]
    assert metric.metrics()["max_f"] == pytest.approx(slow(*together), abs=1e-4)


def test_a_perfect_map_has_100_and_no_salient_pixel_0() -> None:
    labels = torch.tensor([[0, 1, 255]])
    perfect, nothing = counter(), counter()
    perfect.add(torch.tensor([[0.0, 1.0, 0.0]]), labels)
    nothing.add(torch.tensor([[0.3, 0.2, 0.1]]), torch.tensor([[0, 0, 255]]))
    assert perfect.metrics()["max_f"] == 100
    assert nothing.metrics()["max_f"] == 0


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"saliency: expected probabilities in \[0, 1\], got "):
        counter().add(torch.tensor([0.5, value]), torch.tensor([0, 1]))
