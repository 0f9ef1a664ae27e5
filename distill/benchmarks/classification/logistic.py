"""Logistic regression of cached features: scikit-learn's LBFGS to its optimum.

As DINOv2 does (Oquab et al. 2023): unit vectors, C chosen on a held-out tenth of train, then fitted
again on all of it.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt

from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.classification.classification_data import (
    ClassificationConfig,
    Examples,
    load_classification_data,
)
from distill.benchmarks.classification.linear import write_choice
from distill.runtime import distributed
from teachers.teacher import Teacher


class LogisticConfig(ClassificationConfig):
    """How strongly weights are held back.

    Attributes:
        c_values: inverses of the squared norm's weight, scikit-learn's C, that are tried.
            (DINOv2 tries 45 from 1e-6 to 1e5.)
        max_iterations: of LBFGS.
    """

    kind: str = "logistic"
    c_values: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        *(1e-1, 1.0, 1e1, 1e2, 1e3, 1e4),
    )
    max_iterations: PositiveInt = 1000


class Logistic(Benchmark):
    """Top-1 accuracy of multinomial logistic regression.

    Args:
        config: the data and the C that are tried.
    """

    Config: ClassVar[type[BenchmarkConfig]] = LogisticConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Fits and tests; see `Benchmark.measure`. Writes each C's accuracy, held out."""
        config: LogisticConfig = self.config
        data = load_classification_data(encoder, config, seed)

        def fitted(examples: Examples, c: float, tested: Examples) -> float:
            return fit_and_score(examples, c, config.max_iterations, tested)

        held_out = {c: fitted(data.fitted, c, data.chosen_on) for c in config.c_values}
        best = max(held_out, key=lambda c: (held_out[c], -c))
        write_choice(folder, "c_value", held_out, best)
        return Measurement({"top1": fitted(data.train, best, data.test)}, data.protocol)


def fit_and_score(examples: Examples, c: float, max_iterations: int, tested: Examples) -> float:
    """Per cent right of `tested` by a regression of `examples`; rank 0 fits, all get the figure."""
    if distributed.rank() != 0:
        return float(distributed.broadcast_object(None))
    from sklearn.linear_model import LogisticRegression  # slow to import

    model: Any = LogisticRegression(C=c, max_iter=max_iterations)
    model.fit(F.normalize(examples.vectors, dim=1).numpy(), examples.labels.numpy())
    guesses = model.predict(F.normalize(tested.vectors, dim=1).numpy())
    percent = 100 * float((guesses == tested.labels.numpy()).mean())
    return float(distributed.broadcast_object(percent))
