"""k-nearest-neighbour classification: the neighbours vote by exp(cosine / T) (Wu et al. 2018).

The train vectors (the bank) are not gathered: each rank searches its own share for all queries,
and the results are merged. Of 1.28 million vectors of 1,024 numbers, each of 8 ranks holds 0.7 GB.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from data.labelled.class_folders import ClassFolders, ClassImages
from data.labelled.image_surveys import ClassFolderSurvey
from data.labelled.prepared import ImagePreparation, PreparationConfig
from data.labelled.survey import SPLITS, Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.classification.summaries import Encoding, SummaryConfig, accuracy
from distill.benchmarks.sharing import gather_shares, own_share
from distill.runtime import distributed
from teachers.teacher import Teacher

_CHUNK = 1 << 25  # cosines at once: 128 MB, and as much again to sort
_BANK_ROWS = 1 << 15


class KNNConfig(SummaryConfig):
    """k-nearest-neighbour classification.

    Attributes:
        dataset: one folder for each class.
        neighbours: values of k; one metric for each, the first is the headline.
        temperature: T of the votes exp(cosine / T).
        split: `test` classifies the test images by the train images; `leave_one_out` each image of
            both by all the others, for small sets: of a hundred test images, one is 1 %.
    """

    kind: str = "knn"
    dataset: ClassFolders
    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (20, 10, 5, 1)
    temperature: PositiveFloat = 0.07
    split: Literal["test", "leave_one_out"] = "test"


class KNN(Benchmark):
    """Top-1 accuracy by the votes of neighbours, without any training."""

    Config: ClassVar[type[BenchmarkConfig]] = KNNConfig
    seeded = False

    def survey(self) -> Survey:
        """Images of each class."""
        config: KNNConfig = self.config
        return ClassFolderSurvey(config.dataset, SPLITS, neighbours=config.neighbours)

    def check(self, encoder: Teacher) -> None:
        """Checks features and sizes; see `Benchmark.check`."""
        Encoding(encoder, self.config)

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Classifies the images, and draws some with their neighbours; see `Benchmark`."""
        config: KNNConfig = self.config
        encode = Encoding(encoder, config)
        dataset = config.dataset
        with (
            dataset.open("train") as train,
            dataset.open("test", train.classes) as test,
        ):
            counts = _counts(train, test)
            bank = encode(train.names, train.read, f"{dataset.model_dump_json()} train")
            queries = encode(test.names, test.read, f"{dataset.model_dump_json()} test")
            most, device = max(config.neighbours), distributed.device()
            if config.split == "leave_one_out":
                train = test = _joined(train, test)
                counts["split"] = config.split
                vectors = torch.cat([bank.gathered(), queries.gathered()])
                nearest = find_others(vectors, min(most, len(vectors) - 1), device)
            else:
                most = min(most, len(train.names))
                nearest = find_nearest(queries.gathered(), bank.own, most, device)
            if distributed.rank() == 0:
                draw_neighbours(folder / "neighbours.png", test, train, nearest.numbers)
        metrics = {}
        labels, truth = torch.tensor(train.labels), torch.tensor(test.labels)
        for k in config.neighbours:
            votes = vote(nearest, labels, len(train.classes), k, config.temperature)
            metrics[f"k{k}"] = accuracy(votes, truth)
        return Measurement(metrics, encode.protocol | counts)


class Nearest(NamedTuple):
    """The nearest bank vectors of queries, nearest first.

    Attributes:
        cosine: (Q, k).
        numbers: (Q, k) of the vectors in the whole bank.
    """

    cosine: Tensor
    numbers: Tensor


def find_nearest(queries: Tensor, bank: Tensor, k: int, device: torch.device) -> Nearest:
    """Searches the banks of all ranks for the nearest neighbours of queries.

    Args:
        queries: (Q, D), the same on every rank.
        bank: (n, D), this rank's share of the bank, see `sharing.own_share`.
        k: neighbours of each query, at most the size of the bank.
        device: where cosines are computed.

    Returns:
        On the CPU, the same on every rank.
    """
    cosine, index = _local(queries, bank, min(k, len(bank)), device)
    lacking = (0, k - cosine.shape[1])  # a share may be smaller than k
    padded = F.pad(cosine, lacking, value=-torch.inf), F.pad(index, lacking)
    world = distributed.world_size()
    cosine, index = (
        gather_shares(part[None], world).cpu().transpose(0, 1).flatten(1) for part in padded
    )
    order = _ordered(cosine, index)[:, :k]
    return Nearest(cosine.gather(1, order), index.gather(1, order))


def find_others(vectors: Tensor, k: int, device: torch.device) -> Nearest:
    """The nearest neighbours of vectors among the others.

    Args:
        vectors: (N, D), the same on every rank.
        k: neighbours of each, below N.
        device: where cosines are computed.

    Returns:
        As `find_nearest`.
    """
    nearest = find_nearest(vectors, vectors[list(own_share(len(vectors)))], k + 1, device)
    own = nearest.numbers == torch.arange(len(vectors))[:, None]
    own[:, -1] |= ~own.any(1)  # copies of a vector may come before it, and crowd it out
    return Nearest(*(part[~own].view(len(vectors), k) for part in nearest))


def _local(queries: Tensor, bank: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The k nearest of this rank's bank: cosines and numbers in the whole bank, (Q, k) each."""
    world = distributed.world_size()
    numbers = torch.arange(len(bank), device=device) * world + distributed.rank()
    unit = F.normalize(queries.to(device), dim=1)
    cosine = torch.empty(len(queries), 0, device=device)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=device)
    rows = max(1, _CHUNK // _BANK_ROWS)
    for start in range(0, len(bank), _BANK_ROWS):
        block = F.normalize(bank[start : start + _BANK_ROWS].to(device), dim=1)
        parts = []
        for first in range(0, len(queries), rows):
            here = slice(first, first + rows)
            cosines = unit[here] @ block.T
            near, where = cosines.topk(min(k, len(block)), dim=1)
            joined = torch.cat([cosine[here], near], 1)
            named = torch.cat([index[here], numbers[start + where]], 1)
            order = _ordered(joined, named)[:, :k]
            parts.append((joined.gather(1, order), named.gather(1, order)))
        cosine, index = (torch.cat(each) for each in zip(*parts, strict=True))
    return cosine, index


def _ordered(cosine: Tensor, index: Tensor) -> Tensor:
    """The order (Q, n) by decreasing cosine; of equal ones the earlier in the bank comes first."""
    by_number = index.argsort(dim=1, stable=True)
    by_cosine = cosine.gather(1, by_number).argsort(dim=1, descending=True, stable=True)
    return by_number.gather(1, by_cosine)


def vote(nearest: Nearest, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes for each class, (Q, K) float64: the sum of exp(cosine / T) over the k nearest.

    Args:
        nearest: at least k neighbours of each query, or the whole bank.
        labels: (N,) classes of the bank.
        num_classes: K.
        k: neighbours that vote.
        temperature: T.
    """
    weights = (nearest.cosine[:, :k].double() / temperature).exp()
    votes = torch.zeros(len(weights), num_classes, dtype=torch.float64)
    return votes.scatter_add_(1, labels[nearest.numbers[:, :k]], weights)


def _counts(train: ClassImages, test: ClassImages) -> dict[str, Any]:
    return {
        "train_images": len(train.names),
        "test_images": len(test.names),
        "classes": len(train.classes),
    }


def _joined(train: ClassImages, test: ClassImages) -> ClassImages:
    """All images of two open splits with the same classes, as one."""
    count = len(train.names)
    names = [*(f"train/{name}" for name in train.names), *(f"test/{name}" for name in test.names)]
    splits = dict.fromkeys(names[:count], train) | dict.fromkeys(names[count:], test)

    def read(name: str) -> bytes:
        return splits[name].read(name.partition("/")[2])

    return ClassImages(names, [*train.labels, *test.labels], train.classes, read)


_SIDE, _FRAME, _ROWS, _COLUMNS = 112, 4, 8, 5
_RIGHT, _WRONG = "#2a9d3a", "#c8372d"


def draw_neighbours(path: Path, test: ClassImages, train: ClassImages, index: Tensor) -> None:
    """Draws a few test images, spread over the classes, each followed by its neighbours.

    Args:
        path: the PNG to write.
        test: the classified images, open for reading.
        train: the bank, open for reading.
        index: (Q, k) numbers in the bank of each test image's neighbours, nearest first.
    """
    prepare = ImagePreparation(PreparationConfig(), (_SIDE, _SIDE), 1)

    def panel(images: ClassImages, number: int, colour: str) -> Image.Image:
        name = images.names[number]
        picture = Image.fromarray(prepare(images.read(name), name))
        return ImageOps.expand(picture, _FRAME, colour)

    rows, columns = min(_ROWS, len(index)), min(_COLUMNS, index.shape[1])
    step = _SIDE + 2 * _FRAME
    sheet = Image.new("RGB", ((1 + columns) * step, rows * step), "white")
    for row in range(rows):
        query = row * len(index) // rows
        sheet.paste(panel(test, query, "white"), (0, row * step))
        for column, number in enumerate(index[query, :columns].tolist()):
            right = train.labels[number] == test.labels[query]
            picture = panel(train, number, _RIGHT if right else _WRONG)
            sheet.paste(picture, ((1 + column) * step, row * step))
    sheet.save(path)
