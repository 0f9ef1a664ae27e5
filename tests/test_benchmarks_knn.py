"""Vectors of images and their neighbours' votes: exact, and the same in pieces."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from data.errors import DataError
from data.labelled.class_folders import ClassFolders
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.classification import knn
from distill.benchmarks.classification.knn import find_nearest, find_others, vote
from distill.benchmarks.classification.summaries import Encoding, SummaryConfig, accuracy
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from tests.class_tree import write_colours
from tests.doubles import Curved, MeanColours

CPU = torch.device("cpu")
TEMPERATURE = 0.07


def colours() -> MeanColours:
    """No summary, one size only."""
    return MeanColours(4, (8, 8))


def pixels() -> Pixels:
    return Pixels(PixelsConfig(patch_size=4, resolution=(16, 16)))


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def measure(root: Path, folder: Path, **changes: Any) -> Any:
    dataset = {"kind": "class_folders", "root": str(root)}
    entry = {"kind": "knn", "dataset": dataset, "neighbours": [4, 1], "batch_size": 4}
    folder.mkdir(exist_ok=True)
    return build_benchmark(parse_benchmark(entry | changes)).measure(pixels(), 0, folder)


def encode(encoder: Teacher, root: Path, **how: Any) -> Tensor:
    config = SummaryConfig.model_validate({"kind": "knn", **how})
    with ClassFolders(root=root).open("train") as images:
        return Encoding(encoder, config)(images.names, images.read, str(root)).gathered()


def test_votes_equal_a_slow_exact_reference() -> None:
    queries, bank = vectors(30, 0), vectors(50, 1)
    labels = torch.arange(50) % 7
    votes = vote(find_nearest(queries, bank, 20, CPU), labels, 7, 20, TEMPERATURE)
    for row, query in enumerate(queries.double().numpy()):
        each = bank.double().numpy()
        cosine = each @ query / np.linalg.norm(each, axis=1) / np.linalg.norm(query)
        due = np.zeros(7)
        for number in sorted(range(50), key=lambda n: -cosine[n])[:20]:
            due[labels[number]] += np.exp(cosine[number] / TEMPERATURE)
        assert np.allclose(votes[row], due, rtol=1e-4)


def test_the_others_are_those_of_a_slow_reference_also_among_copies() -> None:
    vectors_ = vectors(40, 0)
    vectors_[20:30] = vectors_[5]  # more copies than neighbours
    near = find_others(vectors_, 3, CPU)
    unit = torch.nn.functional.normalize(vectors_, dim=1)
    for row in range(40):
        cosine = [(-float(unit[row] @ unit[n]), n) for n in range(40) if n != row]
        due = torch.tensor([-c for c, _ in sorted(cosine)[:3]])
        assert row not in near.numbers[row]
        assert len(set(near.numbers[row].tolist())) == 3
        assert torch.allclose(near.cosine[row], due, atol=1e-6)


def test_leave_one_out_classifies_all_images_by_the_others(tmp_path: Path) -> None:
    root = write_colours(tmp_path / "set")
    measured = measure(root, tmp_path / "all", split="leave_one_out", neighbours=[1])
    with (
        ClassFolders(root=root).open("train") as train,
        ClassFolders(root=root).open("test", train.classes) as test,
    ):
        encoding = Encoding(pixels(), SummaryConfig.model_validate({"kind": "knn"}))
        sets = [encoding(s.names, s.read, str(i)).own for i, s in enumerate((train, test))]
        unit = torch.nn.functional.normalize(torch.cat(sets), dim=1)
        labels = [*train.labels, *test.labels]
    right = 0
    for row in range(len(labels)):
        others = [n for n in range(len(labels)) if n != row]
        best = max(others, key=lambda n: float(unit[row] @ unit[n]))
        right += labels[best] == labels[row]
    assert measured.metrics["k1"] == pytest.approx(100 * right / len(labels))
    assert measured.protocol["split"] == "leave_one_out"
    with Image.open(tmp_path / "all" / "neighbours.png") as sheet:
        assert sheet.size[1] == 8 * 120


@pytest.mark.parametrize("k", [1, 4, 20])
def test_classes_equal_those_of_scikit_learn(k: int) -> None:
    queries, bank = vectors(200, 0), vectors(300, 1)
    labels = torch.arange(300) % 9
    reference = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(bank.numpy(), labels.numpy())
    votes = vote(find_nearest(queries, bank, 25, CPU), labels, 9, k, TEMPERATURE)
    assert votes.argmax(1).tolist() == reference.predict(queries.numpy()).tolist()


def test_pieces_of_the_bank_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = vectors(20, 0), vectors(50, 1)
    bank[30] = bank[3]  # equal cosines keep the order of the bank
    whole = find_nearest(queries, bank, 12, CPU)
    monkeypatch.setattr(knn, "_BANK_ROWS", 7)
    monkeypatch.setattr(knn, "_CHUNK", 21)
    pieces = find_nearest(queries, bank, 12, CPU)
    assert torch.equal(pieces.numbers, whole.numbers)
    assert torch.allclose(pieces.cosine, whole.cosine)
    both = [row.tolist() for row in whole.numbers if {3, 30} <= set(row.tolist())]
    assert both
    assert all(row.index(3) + 1 == row.index(30) for row in both)


def test_uneven_batches_give_the_figures_of_one(tmp_path: Path) -> None:
    root = write_colours(tmp_path / "set")
    measured = measure(root, tmp_path / "one")
    assert measure(root, tmp_path / "other", batch_size=7) == measured
    assert measured.protocol["train_images"] == 15
    assert measured.protocol["features"] == "summary"
    assert measured.metrics["k4"] > 60
    with Image.open(tmp_path / "one" / "neighbours.png") as sheet:
        assert sheet.size == (5 * 120, 8 * 120)


def test_more_neighbours_than_images_are_all_of_them(tmp_path: Path) -> None:
    root = write_colours(tmp_path / "set")
    figures = measure(root, tmp_path, neighbours=[15, 99]).metrics
    assert figures["k15"] == figures["k99"]


def test_vectors_are_the_summary_the_mean_or_both(tmp_path: Path) -> None:
    root = write_colours(tmp_path)
    images = [root / "train" / c / f"{i}.png" for c in ("blue", "green") for i in range(5)]
    batch = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
            for path in images
        ]
    )
    summary, spatial = pixels()(batch)
    mean = spatial.mean((2, 3))
    assert summary is not None
    for reading, due in (
        ("summary", summary),
        ("mean", mean),
        ("both", torch.cat([summary, mean], 1)),
    ):
        got = encode(pixels(), root, features=reading, batch_size=4)[:10]
        assert torch.allclose(got, due, atol=1e-6), reading


def test_images_of_many_sizes_keep_their_order(tmp_path: Path) -> None:
    root = write_colours(tmp_path)
    images = {"fit": "whole", "resolution": [16, 16]}
    kept = encode(pixels(), root, images=images, features="mean", batch_size=4)
    cropped = encode(pixels(), root, features="mean", batch_size=4)
    wide = 10  # the first red one, of 16 x 23 px
    assert torch.allclose(kept[:wide], cropped[:wide], atol=1e-6)
    assert torch.allclose(kept[wide + 1 :], cropped[wide + 1 :], atol=1e-6)
    assert not torch.allclose(kept[wide], cropped[wide], atol=1e-3)


def test_nothing_is_encoded_twice_until_weights_change(tmp_path: Path) -> None:
    root, encoder = write_colours(tmp_path), Curved()
    first = encode(encoder, root, batch_size=15)
    assert torch.equal(encode(encoder, root, batch_size=15), first)
    assert encoder.batches == [15]
    encode(encoder, root, batch_size=15, features="mean")
    assert encoder.batches == [15, 15]
    encoder.net.weight.data.mul_(2)
    changed = encode(encoder, root, batch_size=15, features="mean")
    assert encoder.batches == [15, 15, 15]
    assert changed.shape == (15, 8)


def test_accuracy_counts_every_row_alike() -> None:
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3]])
    labels = torch.tensor([0, 1, 2, 2])
    assert accuracy(scores, labels) == 50
    assert accuracy(scores, labels, 2) == 75


def test_an_encoder_without_a_summary_is_read_by_its_mean(tmp_path: Path) -> None:
    root = write_colours(tmp_path)
    assert Encoding(colours(), SummaryConfig(kind="knn")).protocol == {
        "resolution": [8, 8],
        "features": "mean",
    }
    assert encode(colours(), root).shape == (15, 3)
    with pytest.raises(TeacherError, match="both, but MeanColours has no summary; set mean"):
        encode(colours(), root, features="both")


@pytest.mark.parametrize(
    "encoder, images, message",
    [
        (
            colours(),
            {"resolution": [12, 8]},
            r"takes no images of 12 x 8 px; .* is \[8, 8\]",
        ),
        (pixels(), {"resolution": [15, 17]}, r"no images of 15 x 17 px; .* is \[16, 16\]"),
        (
            colours(),
            {"fit": "whole"},
            "MeanColours takes 8 x 8 px only; take crop or squash",
        ),
    ],
)
def test_a_size_that_the_encoder_does_not_take_is_refused(
    tmp_path: Path, encoder: Teacher, images: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        encode(encoder, write_colours(tmp_path), images=images)


def test_data_that_are_not_there_are_asked_for_with_their_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)there is no .*train/<class>/\*.jpg"):
        measure(tmp_path / "nowhere", tmp_path)
