"""Linear classification of cached features, with several learning rates in one pass.

This is DINO's probe (Caron et al. 2021; Oquab et al. 2023, appendix B.3) with three differences:
features are cached, so there is no augmentation; they are standardised, so that a learning rate
means the same for every encoder; and the rate is chosen on held-out train images, after which the
classifier is trained again on all of train.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from data.files import write_text
from distill.benchmarks.benchmark import BenchmarkConfig, Measurement
from distill.benchmarks.classification.classification_data import (
    ClassificationConfig,
    Examples,
    TrainedClassifier,
    load_classification_data,
)
from distill.benchmarks.classification.summaries import accuracy
from distill.benchmarks.dense.probe_training import ProbeConfig, train_heads
from distill.runtime import distributed
from teachers.teacher import Teacher

_ROWS = 1 << 14  # vectors that are processed at once


def _distinct(rates: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(rates)) < len(rates):
        raise ValueError(f"expected different rates, got {list(rates)}")
    return rates


class LinearConfig(ClassificationConfig):
    """Training of linear classifiers.

    Attributes:
        steps: of SGD; 12,500 of 1,024 images are ten epochs of ImageNet.
        step_images: images of a step.
        rates: learning rates for 256 images a step, scaled with `step_images`; they decay by half a
            cosine to 0.
    """

    kind: str = "linear"
    steps: PositiveInt = 12_500
    step_images: PositiveInt = 1024
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1), AfterValidator(_distinct)] = (
        *(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        *(1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0),
    )


class Linear(TrainedClassifier):
    """Top-1 and top-5 accuracy of a linear classifier."""

    Config: ClassVar[type[BenchmarkConfig]] = LinearConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Trains and tests; also writes the held-out accuracy of each rate; see `Benchmark`."""
        config: LinearConfig = self.config
        data = load_classification_data(encoder, config, seed)
        num = data.num_classes
        heads = train_linear(data.fitted, num, config, config.rates, seed)
        chosen_on = data.chosen_on
        held_out = [accuracy(head.scores(chosen_on.vectors), chosen_on.labels) for head in heads]
        # Of equally good rates the middle one: the outer ones are closer to failing.
        best = [i for i, value in enumerate(held_out) if value == max(held_out)]
        rate = config.rates[best[len(best) // 2]]
        write_choice(folder, "rate", dict(zip(config.rates, held_out, strict=True)), rate)
        (head,) = train_linear(data.train, num, config, [rate], seed)
        scores = head.scores(data.test.vectors)
        metrics = {"top1": accuracy(scores, data.test.labels)}
        if num > 5:
            metrics["top5"] = accuracy(scores, data.test.labels, 5)
        return Measurement(metrics, data.protocol)


class StandardisedLinear(nn.Module):
    """A linear classifier of standardised vectors.

    Args:
        mean: (D,).
        deviation: (D,).
        num_classes: K.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), num_classes)
        nn.init.zeros_(self.linear.weight)  # the problem is convex: no symmetry to break
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Scores (B, K) of vectors (B, D)."""
        scores: Tensor = self.linear((vectors - self.mean) / self.deviation)
        return scores

    def scores(self, vectors: Tensor) -> Tensor:
        """Scores of any number of vectors, which are on the CPU, as are the scores."""
        chunks = (chunk.to(self.mean.device) for chunk in vectors.split(_ROWS))
        return torch.cat([self(chunk).cpu() for chunk in chunks])


def train_linear(
    examples: Examples, num_classes: int, config: LinearConfig, rates: Sequence[float], seed: int
) -> list[StandardisedLinear]:
    """Trains one classifier for each rate on the same batches, by SGD with momentum, no decay.

    Args:
        examples: to train on.
        num_classes: K.
        config: of the training.
        rates: for 256 images a step.
        seed: of the order of images.
    """
    mean, deviation = fit_standardisation(examples.vectors)
    device = distributed.device()

    def batches(numbers: Sequence[int], step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        vectors, labels = (each[numbers].to(device) for each in examples)
        return (vectors,), labels

    return train_heads(
        lambda: StandardisedLinear(mean, deviation, num_classes),
        ProbeConfig(
            steps=config.steps,
            batch_size=config.step_images,
            optimizer="sgd",
            lr=tuple(rate * config.step_images / 256 for rate in rates),
            schedule="cosine",
        ),
        batches,
        lambda scores, labels, step: F.cross_entropy(scores, labels),
        len(examples.labels),
        seed,
    )


def fit_standardisation(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of each channel of vectors (N, D), summed in float64.

    The deviation is at least a millionth of the largest, so that constant channels become 0.
    """
    sums = torch.zeros(2, vectors.shape[1], dtype=torch.float64)
    for chunk in vectors.split(_ROWS):
        sums += torch.stack([chunk.double().sum(0), chunk.double().square().sum(0)])
    mean, square = sums / len(vectors)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    deviation = deviation.clamp(min=1e-6 * deviation.max().clamp(min=1e-12))
    return mean.float(), deviation.float()


def write_choice(folder: Path, name: str, tried: dict[float, float], chosen: float) -> None:
    """Writes how a hyperparameter was chosen; prints a hint if it is the smallest or largest value.

    Args:
        folder: gets `NAME.json`.
        name: of the hyperparameter.
        tried: value to accuracy in per cent on the held-out images.
        chosen: one of the values.
    """
    if distributed.rank() != 0:
        return
    facts = {"chosen": chosen, "held_out_accuracy": {str(k): v for k, v in tried.items()}}
    write_text(folder / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    if len(tried) > 1 and chosen in (min(tried), max(tried)):
        print(f"{name} {chosen:g} is at the end of the range that was tried; try a wider range")
