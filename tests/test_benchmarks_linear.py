"""Trained classifiers: known optima, and what settings are chosen on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data.errors import DataError
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.classification import linear
from distill.benchmarks.classification.classification_data import Examples, hold_out
from distill.benchmarks.classification.linear import LinearConfig, train_linear
from distill.benchmarks.classification.logistic import fit_and_score
from distill.evaluation.models import Pixels, PixelsConfig
from distill.runtime.errors import RecipeError
from teachers.errors import TeacherError
from tests.class_tree import write_colours

DATASET = {"kind": "class_folders", "root": "unused"}


def linear_config(**changes: Any) -> LinearConfig:
    entry = {"kind": "linear", "dataset": DATASET, "steps": 300, "step_images": 64}
    return LinearConfig.model_validate(entry | changes)


def examples(count: int, noise: float, seed: int = 0) -> Examples:
    """Three classes around far points, in channels of very different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    points = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    vectors = points[labels] + noise * torch.randn(count, 3, generator=generator)
    constant = torch.full((count, 1), 5.0)
    scaled = vectors * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, 7.0, 1.0])
    return Examples(torch.cat([scaled, constant], 1), labels)


def measure(kind: str, root: Path, folder: Path, **changes: Any) -> Measurement:
    folder.mkdir(exist_ok=True, parents=True)
    entry: dict[str, Any] = {"kind": kind, "dataset": DATASET | {"root": str(root)}}
    entry |= {"held_out": 0.2} | changes
    encoder = Pixels(PixelsConfig(patch_size=4, resolution=(16, 16)))
    return build_benchmark(parse_benchmark(entry)).measure(encoder, 0, folder)


def test_separable_classes_are_all_right() -> None:
    train, test = examples(300, 0.1), examples(200, 0.1, seed=1)
    (head,) = train_linear(train, 3, linear_config(), [0.1], seed=0)
    assert (head.scores(test.vectors).argmax(1) == test.labels).all()


@pytest.mark.long
def test_the_linear_optimum_is_that_of_scikit_learn() -> None:
    """Overlapping classes have a finite optimum; without decay, C is infinite."""
    train = examples(400, 0.6)
    config = linear_config(steps=600, step_images=400)  # every step sees nearly all
    (head,) = train_linear(train, 3, config, [0.3], seed=0)
    scaled = StandardScaler().fit_transform(train.vectors.double().numpy())
    reference = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(scaled, train.labels)
    due = F.cross_entropy(
        torch.from_numpy(reference.decision_function(scaled)), train.labels
    ).item()
    got = F.cross_entropy(head.scores(train.vectors).double(), train.labels).item()
    assert due < got < 1.01 * due


def test_channels_are_brought_to_zero_mean_and_unit_deviation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_ROWS", 7)
    vectors = examples(50, 0.5).vectors
    mean, deviation = linear.fit_standardisation(vectors)
    due = StandardScaler().fit(vectors.double().numpy())
    assert np.allclose(mean, due.mean_, rtol=1e-6)
    assert np.allclose(deviation[:3], due.scale_[:3], rtol=1e-5)
    assert ((vectors - mean) / deviation)[:, 3].abs().max() < 1e-3  # it never changes


def test_several_rates_in_one_pass_are_those_one_by_one() -> None:
    train = examples(50, 0.5)
    config = linear_config(steps=20, step_images=16)
    together = train_linear(train, 3, config, [0.01, 0.1], seed=3)
    for head, rate in zip(together, [0.01, 0.1], strict=True):
        (alone,) = train_linear(train, 3, config, [rate], seed=3)
        assert torch.equal(head.linear.weight, alone.linear.weight)


def test_settings_are_chosen_on_held_out_train_images_alone() -> None:
    train = Examples(torch.arange(40).view(-1, 1).float(), torch.arange(40))
    left, out = hold_out(train, 0.1, seed=0)
    assert len(out.labels) == 4
    assert sorted([*left.labels.tolist(), *out.labels.tolist()]) == list(range(40))
    assert torch.equal(left.vectors[:, 0].long(), left.labels)
    assert torch.equal(hold_out(train, 0.1, seed=0)[1].labels, out.labels)
    assert not torch.equal(hold_out(train, 0.1, seed=1)[1].labels, out.labels)
    with pytest.raises(DataError, match=r"held_out: 0.01 of 40 train images is 0"):
        hold_out(train, 0.01, seed=0)


def test_the_best_rate_held_out_is_trained_again_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, list[float]]] = []
    original = linear.train_linear

    def watched(given: Examples, num: int, config: Any, rates: Any, seed: int) -> Any:
        calls.append((len(given.labels), list(rates)))
        return original(given, num, config, rates, seed)

    monkeypatch.setattr(linear, "train_linear", watched)
    root = write_colours(tmp_path / "set")
    rates = [1e-9, 1e-1]
    measured = measure("linear", root, tmp_path, steps=30, step_images=8, rates=rates)
    kept = json.loads((tmp_path / "rate.json").read_text())
    tried, chosen = kept["held_out_accuracy"], kept["chosen"]
    assert tried[str(chosen)] == max(tried.values())
    assert calls == [(12, rates), (15, [chosen])]
    assert measured.metrics.keys() == {"top1"}
    assert "without augmentation" in measured.protocol["cached"]


def test_a_setting_at_the_end_of_what_was_tried_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear.write_choice(tmp_path, "rate", {0.1: 50.0, 0.2: 60.0, 0.3: 55.0}, 0.2)
    assert capsys.readouterr().out == ""
    linear.write_choice(tmp_path, "rate", {0.1: 50.0, 0.2: 60.0}, 0.2)
    assert "rate 0.2 is at the end of the range that was tried" in capsys.readouterr().out


def test_the_logistic_figure_is_that_of_scikit_learn_on_unit_vectors() -> None:
    train, test = examples(200, 0.5), examples(100, 0.5, seed=1)
    model = LogisticRegression(C=10, max_iter=1000)
    model.fit(F.normalize(train.vectors, dim=1).numpy(), train.labels.numpy())
    due = 100 * model.score(F.normalize(test.vectors, dim=1).numpy(), test.labels.numpy())
    assert fit_and_score(train, 10, 1000, test) == pytest.approx(due)
    assert 50 < due < 100


def test_a_rate_that_is_there_twice_is_refused() -> None:
    entry = {"kind": "linear", "dataset": DATASET, "rates": [0.1, 0.1]}
    with pytest.raises((TeacherError, RecipeError), match=r"rates: expected different rates"):
        parse_benchmark(entry)
