"""Retrieval of captions by images and of images by captions, by cosine similarity.

Recall at k is that of CLIP and SigLIP: the share of queries with any correct result among the first
k. (Recall in the strict sense would divide by the five correct captions of an image.)
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from data.labelled.captions import CaptionData
from data.labelled.image_surveys import CaptionSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.classification.summaries import Encoding
from distill.benchmarks.classification.text_side import (
    TextConfig,
    check_text,
    load_text_tower,
    text_identity,
)
from distill.benchmarks.sharing import gather_shares, own_share
from distill.runtime import distributed
from teachers.teacher import Teacher
from teachers.text_tower import TextTower

_TEXTS, _ROWS = 256, 1024  # processed at once: texts by the tower, and rows of cosines


class RetrievalConfig(TextConfig):
    """Retrieval on a set of captions.

    Attributes:
        dataset: images with captions.
        at: values of k.
    """

    kind: str = "retrieval"
    features: Literal["summary"] = "summary"  # what the text tower was trained with
    dataset: CaptionData
    at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 5, 10)


class Retrieval(Benchmark):
    """Recall of both directions, in per cent."""

    Config: ClassVar[type[BenchmarkConfig]] = RetrievalConfig
    seeded = False

    def survey(self) -> Survey:
        """Images and captions."""
        return CaptionSurvey(self.config.dataset, text_identity(self.config))

    def check(self, encoder: Teacher) -> None:
        """Checks features, sizes and the text tower; see `Benchmark.check`."""
        Encoding(encoder, self.config)
        check_text(self.config, encoder)

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Encodes and searches; see `Benchmark.measure`."""
        config: RetrievalConfig = self.config
        encode = Encoding(encoder, config)
        names, captions, read = config.dataset.load()
        tower = load_text_tower(config, encoder)  # last: it may download weights
        images = encode(names, read, config.dataset.model_dump_json()).gathered()
        texts = encode_texts(tower, [text for group in captions for text in group])
        owner = torch.arange(len(names)).repeat_interleave(
            torch.tensor([len(group) for group in captions])
        )
        ranks = search_ranks(F.normalize(images, dim=1), texts, owner)
        metrics = {
            f"{way}_r{k}": 100 * (found < k).double().mean().item()
            for way, found in zip(("image_to_text", "text_to_image"), ranks, strict=True)
            for k in config.at
        }
        counts = {"test_images": len(names), "captions": len(owner)}
        return Measurement(metrics, encode.protocol | counts)


def encode_texts(tower: TextTower, texts: list[str]) -> Tensor:
    """Unit vectors (N, D) on the CPU; every rank encodes its share."""
    tower.say_unknown(texts)
    own = [texts[number] for number in own_share(len(texts))]
    parts = [tower(own[start : start + _TEXTS]) for start in range(0, len(own), _TEXTS)]
    vectors = torch.cat(parts) if parts else torch.empty(0, tower.dim, device=distributed.device())
    return gather_shares(vectors, len(texts)).cpu()


def search_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """The number of wrong results before the first correct one.

    Wrong results that are as near as the correct one count too: equal vectors find nothing.

    Args:
        images: (N, D) unit vectors.
        texts: (M, D) unit vectors.
        owner: (M,) the image of each text.

    Returns:
        (N,) for each image among the texts, and (M,) for each text among the images.
    """
    device = distributed.device()
    images, texts, owner = images.to(device), texts.to(device), owner.to(device)
    numbers = torch.arange(len(images), device=device)
    parts = (_ranks(images, texts, numbers, owner), _ranks(texts, images, owner, numbers))
    return parts[0].cpu(), parts[1].cpu()


def _ranks(queries: Tensor, answers: Tensor, asked: Tensor, given: Tensor) -> Tensor:
    """Wrong answers at least as near as the nearest correct one, (Q,).

    An answer is correct if its number in `given` is that of the query in `asked`.
    """
    found = []
    for start in range(0, len(queries), _ROWS):
        cosine = queries[start : start + _ROWS] @ answers.T
        right = asked[start : start + _ROWS, None] == given
        best = cosine.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((cosine >= best) & ~right).sum(1))
    return torch.cat(found)
