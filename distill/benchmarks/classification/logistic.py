"""Logistic regression of cached features, by scikit-learn's LBFGS.

The protocol is DINOv2's (Oquab et al. 2023): vectors of unit length, C chosen on a held-out tenth
of train, then a fit on all of train.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt

from distill.benchmarks.benchmark import BenchmarkConfig, Measurement
from distill.benchmarks.classification.classification_data import (
    ClassificationConfig,
    Examples,
    TrainedClassifier,
    load_classification_data,
)
from distill.benchmarks.classification.linear import write_choice
from distill.runtime import distributed
from teachers.teacher import Teacher


class LogisticConfig(ClassificationConfig):
    """Regularisation of a logistic regression.

    Attributes:
        c_values: values of scikit-learn's C, the inverse strength of the penalty, to choose from.
            (DINOv2 has 45 from 1e-6 to 1e5.)
        max_iterations: of LBFGS.
    """

    kind: str = "logistic"
    c_values: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        *(1e-1, 1.0, 1e1, 1e2, 1e3, 1e4),
    )
    max_iterations: PositiveInt = 1000


class Logistic(TrainedClassifier):
    """Top-1 accuracy of multinomial logistic regression."""

    Config: ClassVar[type[BenchmarkConfig]] = LogisticConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Fits and tests; also writes the held-out accuracy of each C; see `Benchmark`."""
        config: LogisticConfig = self.config
        data = load_classification_data(encoder, config, seed)

        def fitted(examples: Examples, c: float, tested: Examples) -> float:
            return fit_and_score(examples, c, config.max_iterations, tested)

        held_out = {c: fitted(data.fitted, c, data.chosen_on) for c in config.c_values}
        best = max(held_out, key=lambda c: (held_out[c], -c))
        write_choice(folder, "c_value", held_out, best)
        return Measurement({"top1": fitted(data.train, best, data.test)}, data.protocol)


def fit_and_score(examples: Examples, c: float, max_iterations: int, tested: Examples) -> float:
    """Accuracy on `tested` in per cent of a fit to `examples`; rank 0 fits, all ranks return it."""
    if distributed.rank() != 0:
        return float(distributed.broadcast_object(None))
    from sklearn.linear_model import LogisticRegression  # slow to import

    model: Any = LogisticRegression(C=c, max_iter=max_iterations)
    model.fit(F.normalize(examples.vectors, dim=1).numpy(), examples.labels.numpy())
    guesses = model.predict(F.normalize(tested.vectors, dim=1).numpy())
    percent = 100 * float((guesses == tested.labels.numpy()).mean())
    return float(distributed.broadcast_object(percent))
