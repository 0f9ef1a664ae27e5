"""Every image-level benchmark on two ranks: the figures of one, to the last digit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.classification import summaries
from distill.benchmarks.classification.knn import find_nearest
from distill.benchmarks.classification.summaries import Summaries
from distill.benchmarks.sharing import own_share
from teachers.build import build_teacher, parse_teacher
from tests.class_tree import COLOURS, write_colours
from tests.ranks import run_on_ranks
from tests.tiny_clip import write_tiny_clip

pytestmark = pytest.mark.process

CAPTIONS = [["a red square", "red"], ["something green", "grass"], ["the sea", "blue paint", "sky"]]


def write_captions(root: Path) -> Path:
    """A tree of COCO with three images and seven captions."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    rng = np.random.default_rng(0)
    stored: dict[str, Any] = {"images": [], "annotations": []}
    for number, texts in enumerate(CAPTIONS):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val2017" / f"{number}.png")
        stored["images"].append({"id": number, "file_name": f"{number}.png"})
        stored["annotations"] += [{"image_id": number, "caption": text} for text in texts]
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(stored))
    return root


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The benchmarks; writes what they read."""
    colours = write_colours(folder / "set")
    (folder / "names.txt").write_text("\n".join(COLOURS))
    classes = {"dataset": {"kind": "class_folders", "root": str(colours)}, "batch_size": 4}
    captions = {"kind": "coco_captions", "root": str(write_captions(folder / "coco"))}
    text = {"text": {"model": str(folder / "clip")}}
    probe = {**classes, "held_out": 0.2}
    names = {"class_names": str(folder / "names.txt")}
    return {
        "knn": {**classes, "neighbours": [4, 1]},
        "linear": {**probe, "steps": 30, "step_images": 8, "rates": [0.001, 0.1, 1.0]},
        "logistic": {**probe, "c_values": [0.01, 1, 100]},
        "zero_shot": {**classes, **text, **names, "templates": ["a {}", "the {}."]},
        "retrieval": {**text, "dataset": captions, "at": [1, 2]},
    }


def measure_all(benchmarks: dict[str, dict[str, Any]], folder: Path) -> dict[str, Measurement]:
    folder.mkdir(exist_ok=True)
    model = {"kind": "dfn_clip", "model": str(folder.parent / "clip")}
    encoder = build_teacher(parse_teacher(model))
    built = {k: build_benchmark(parse_benchmark({"kind": k} | e)) for k, e in benchmarks.items()}
    return {kind: each.measure(encoder, 0, folder) for kind, each in built.items()}


def nearest_in_small_shares() -> tuple[list[list[int]], Tensor]:
    """Each share of the bank has fewer vectors than are asked for."""
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    nearest = find_nearest(queries, bank[list(own_share(5))], 5, torch.device("cpu"))
    return nearest.numbers.tolist(), nearest.cosine


def gathered_in_pieces() -> list[int]:
    whole, summaries._GATHERED = summaries._GATHERED, 24
    own = torch.tensor([[float(n)] * 6 for n in own_share(11)])
    numbers: list[int] = Summaries(own, 11).gathered()[:, 0].int().tolist()
    summaries._GATHERED = whole
    return numbers


def on_a_rank(benchmarks: dict[str, dict[str, Any]], folder: Path) -> Any:
    return measure_all(benchmarks, folder), nearest_in_small_shares(), gathered_in_pieces()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of one process, and of each of two ranks."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_clip(folder / "clip")
    benchmarks = entries(folder)
    alone = on_a_rank(benchmarks, folder / "alone")
    return [alone, *run_on_ranks(2, on_a_rank, benchmarks, folder / "ranks")]


@pytest.mark.parametrize("kind", ["knn", "linear", "logistic", "zero_shot", "retrieval"])
def test_two_ranks_give_the_figures_of_one(answers: list[Any], kind: str) -> None:
    alone, *ranks = (measured[kind] for measured, _, _ in answers)
    assert ranks == [alone, alone]
    assert all(0 <= figure <= 100 for figure in alone.metrics.values())
    assert any(0 < figure < 100 for figure in alone.metrics.values())


def test_neighbours_are_the_same_however_the_bank_is_shared(answers: list[Any]) -> None:
    numbers, cosine = answers[0][1]
    assert [sorted(row) for row in numbers] == [list(range(5))] * 4
    for _, (some, near), _ in answers[1:]:
        assert some == numbers
        assert torch.allclose(near, cosine, atol=1e-6)


def test_vectors_are_gathered_in_the_order_of_the_images(answers: list[Any]) -> None:
    assert [pieces for _, _, pieces in answers[1:]] == [list(range(11))] * 2


def test_captions_and_images_are_counted(answers: list[Any]) -> None:
    measured = answers[0][0]["retrieval"]
    assert measured.metrics.keys() == {
        *("image_to_text_r1", "image_to_text_r2", "text_to_image_r1", "text_to_image_r2")
    }
    assert (measured.protocol["test_images"], measured.protocol["captions"]) == (3, 7)
