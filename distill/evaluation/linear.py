"""Linear classification of cached features, several learning rates in one pass.

DINO's probe (Caron et al. 2021; Oquab et al. 2023, appendix B.3) but for three things: features are
cached, so there is no augmentation; they are standardised, so that a rate means the same for every
encoder; and the rate is chosen on held-out train images, after which the classifier is trained
again on all of train.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from data.progress import track
from distill import distributed
from distill.evaluation.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.evaluation.probe_data import Examples, ProbeConfig, load_probe_data
from distill.evaluation.summaries import accuracy
from distill.files import write_text
from teachers.teacher import Teacher

_MOMENTUM = 0.9


class LinearConfig(ProbeConfig):
    """How classifiers are trained.

    Attributes:
        steps: of SGD; 12,500 of 1,024 images are ten epochs of ImageNet.
        step_images: images of a step.
        rates: learning rates at 256 images a step, scaled with `step_images`; half a cosine down
            to 0.
    """

    kind: str = "linear"
    steps: PositiveInt = 12_500
    step_images: PositiveInt = 1024
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        *(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        *(1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0),
    )


class Linear(Benchmark):
    """Top-1 and top-5 accuracy of a linear classifier.

    Args:
        config: the data and the training.
    """

    Config: ClassVar[type[BenchmarkConfig]] = LinearConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Trains and tests; see `Benchmark.measure`. Writes each rate's accuracy, held out."""
        config: LinearConfig = self.config
        data = load_probe_data(encoder, config, seed)
        num = data.num_classes
        heads = train_linear(data.fitted, num, config, config.rates, seed)
        held_out = [accuracy(head(data.chosen_on.vectors), data.chosen_on.labels) for head in heads]
        # Of equally good ones the middle: the outer ones are nearer to failing.
        best = [i for i, value in enumerate(held_out) if value == max(held_out)]
        rate = config.rates[best[len(best) // 2]]
        write_choice(folder, "rate", dict(zip(config.rates, held_out, strict=True)), rate)
        (head,) = train_linear(data.train, num, config, [rate], seed)
        scores = head(data.test.vectors)
        figures = {"top1": accuracy(scores, data.test.labels)}
        if num > 5:
            figures["top5"] = accuracy(scores, data.test.labels, 5)
        return Measurement(figures, data.protocol)


class StandardisedLinear(nn.Module):
    """A linear classifier of vectors that are brought to zero mean and unit deviation first.

    Args:
        mean: (D,).
        deviation: (D,).
        num_classes: K.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, num_classes: int) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.linear = nn.Linear(len(mean), num_classes, device=mean.device)
        nn.init.zeros_(self.linear.weight)  # convex: no symmetry has to be broken
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def forward(self, vectors: Tensor) -> Tensor:
        """Scores (N, K), on the CPU, of vectors (N, D)."""
        chunks = (chunk.to(self.mean.device) for chunk in vectors.split(1 << 14))
        return torch.cat([self.linear(self.standardised(chunk)).cpu() for chunk in chunks])

    def standardised(self, vectors: Tensor) -> Tensor:
        """The vectors (N, D) as the linear map takes them."""
        return (vectors - self.mean) / self.deviation


def train_linear(
    examples: Examples,
    num_classes: int,
    config: LinearConfig,
    rates: Sequence[float],
    seed: int,
) -> list[StandardisedLinear]:
    """Trains one classifier a rate on the same batches, by SGD with momentum 0.9 and no decay.

    Args:
        examples: to train on.
        num_classes: K.
        config: steps and images of each.
        rates: at 256 images a step.
        seed: of the order of images.
    """
    device = distributed.device()
    size = min(config.step_images, len(examples.labels))
    deviation, mean = torch.std_mean(examples.vectors.double(), dim=0, correction=0)
    # A channel that never changes stays at zero.
    deviation = deviation.clamp(min=1e-6 * deviation.max().clamp(min=1e-12))
    statistics = mean.float().to(device), deviation.float().to(device)
    heads = [StandardisedLinear(*statistics, num_classes) for _ in rates]
    groups = [
        {"params": head.linear.parameters(), "lr": rate * size / 256}
        for head, rate in zip(heads, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    generator = torch.Generator().manual_seed(distributed.derive_seed(seed, "linear order"))
    steps = range(config.steps)
    order = torch.empty(0, dtype=torch.long)
    for _ in track(steps, "linear") if distributed.rank() == 0 else steps:
        while len(order) < size:
            more = torch.randperm(len(examples.labels), generator=generator)
            order = torch.cat([order, more])
        batch, order = order[:size], order[size:]
        vectors = heads[0].standardised(examples.vectors[batch].to(device))
        labels = examples.labels[batch].to(device)
        # Each head's gradient is of its own term alone.
        losses = [F.cross_entropy(head.linear(vectors), labels) for head in heads]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return heads


def write_choice(folder: Path, name: str, tried: dict[float, float], chosen: float) -> None:
    """Keeps what a setting was chosen from, and says so where it lies at an end of what was tried.

    Args:
        folder: gets `NAME.json`.
        name: of the setting.
        tried: value to accuracy in per cent on the held-out images.
        chosen: one of the values.
    """
    if distributed.rank() != 0:
        return
    facts = {"chosen": chosen, "held_out_accuracy": {str(k): v for k, v in tried.items()}}
    write_text(folder / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    if len(tried) > 1 and chosen in (min(tried), max(tried)):
        print(f"{name} {chosen:g} is at the end of what was tried; wider {name}s may be better")
