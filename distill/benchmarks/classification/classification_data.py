"""Cached vectors of a classification set, with a held-out tenth of train to choose on."""

from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from data.errors import DataError
from data.labelled.class_folders import ClassFolders
from data.labelled.image_surveys import ClassFolderSurvey
from data.labelled.survey import SPLITS, Survey
from distill.benchmarks.benchmark import Benchmark
from distill.benchmarks.classification.summaries import Encoding, SummaryConfig
from distill.runtime.distributed import derive_seed
from teachers.teacher import Teacher


class ClassificationConfig(SummaryConfig):
    """The part of the recipe entry that all trained classifiers share.

    Attributes:
        dataset: one folder for each class.
        held_out: share of the train images that hyperparameters are chosen on.
    """

    dataset: ClassFolders
    held_out: float = Field(0.1, gt=0, lt=1)


class Examples(NamedTuple):
    """Vectors (N, D) float32 and their classes (N,)."""

    vectors: Tensor
    labels: Tensor


class ClassificationData(NamedTuple):
    """A classification set as vectors, the same on every rank.

    Attributes:
        train: all train images.
        fitted: those to fit on while hyperparameters are chosen.
        chosen_on: the held-out ones.
        test: the test images.
        num_classes: K.
        protocol: see `Measurement`.
    """

    train: Examples
    fitted: Examples
    chosen_on: Examples
    test: Examples
    num_classes: int
    protocol: dict[str, Any]


class TrainedClassifier(Benchmark):
    """A benchmark that fits a classifier to the vectors of a classification set."""

    def survey(self) -> Survey:
        """Images of each class.

        Raises:
            DataError: the data are missing, or too few to hold any out.
        """
        config: ClassificationConfig = self.config
        found = ClassFolderSurvey(config.dataset, SPLITS)
        _num_held_out(found.count()["train"]["images"], config.held_out)
        return found

    def check(self, encoder: Teacher) -> None:
        """Checks features and sizes; see `Benchmark.check`."""
        Encoding(encoder, self.config)


def load_classification_data(
    encoder: Teacher, config: ClassificationConfig, seed: int
) -> ClassificationData:
    """Encodes both splits, once for all seeds, and holds out a part of train.

    Raises:
        DataError: the data are missing, or too few to hold any out.
    """
    encode, dataset = Encoding(encoder, config), config.dataset
    with dataset.open("train") as images:
        classes, labels = images.classes, torch.tensor(images.labels)
        made = encode(images.names, images.read, f"{dataset.model_dump_json()} train")
        train = Examples(made.gathered(), labels)
    with dataset.open("test", classes) as images:
        made = encode(images.names, images.read, f"{dataset.model_dump_json()} test")
        test = Examples(made.gathered(), torch.tensor(images.labels))
    fitted, chosen_on = hold_out(train, config.held_out, seed)
    protocol = encode.protocol | {
        "cached": "features of each image once, without augmentation",
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "classes": len(classes),
    }
    return ClassificationData(train, fitted, chosen_on, test, len(classes), protocol)


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Splits examples at random.

    Returns:
        The remaining examples, and the held-out ones.

    Raises:
        DataError: one of the two would be empty.
    """
    count = len(examples.labels)
    taken = _num_held_out(count, share)
    generator = torch.Generator().manual_seed(derive_seed(seed, "held-out"))
    order = torch.randperm(count, generator=generator)
    parts = order[taken:], order[:taken]
    left, out = (Examples(examples.vectors[part], examples.labels[part]) for part in parts)
    return left, out


def _num_held_out(count: int, share: float) -> int:
    taken = round(share * count)
    if not 0 < taken < count:
        raise DataError(
            f"held_out: {share:g} of {count} train images is {taken}; at least one must be held "
            "out, and one remain"
        )
    return taken
