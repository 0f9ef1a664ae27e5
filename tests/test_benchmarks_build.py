"""The table of benchmarks: names of metrics, and configs by kind."""

import pytest

from distill.benchmarks.benchmark import metric_key
from distill.benchmarks.build import BENCHMARKS
from distill.evaluation.kinds import register_evaluation_kinds


@pytest.mark.parametrize("kind", [*BENCHMARKS.table, "resolution_sweep"])
def test_names_of_metrics_are_in_snake_case(kind: str) -> None:
    register_evaluation_kinds()
    names = BENCHMARKS.resolve(kind).lower_is_better
    assert {metric_key(name) for name in names} == names


@pytest.mark.parametrize(
    "older, key",
    [
        ("AP small", "ap_small"),
        ("PCK@0.1 class mean", "pck@0.1_class_mean"),
        ("mean recall cm, 0-30 deg", "mean_recall_cm_0-30_deg"),
        ("expert: lowest cosine", "expert_lowest_cosine"),
        ("miou", "miou"),
    ],
)
def test_older_names_have_keys(older: str, key: str) -> None:
    assert metric_key(older) == key
