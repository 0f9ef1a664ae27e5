"""Relative change and Delta_m: the printed rows, a slow statement, seeds, and what is refused."""

import random
import statistics
from collections.abc import Mapping
from typing import Any

import pytest

from distill.evaluation.relative_change import change_table, relative_changes, split_task
from distill.runtime.errors import RecipeError

GROUPS = ("classification", "dense", "probe3d", "retrieval", "context", "nyud", "vila")
PRINTED = {  # the seven groups' changes, and the Delta_m printed beside them, to three places
    "published": ((-0.47, -0.09, -1.05, -0.45, 0.62, -2.26, 2.24), -0.209),
    "baseline": ((0, 0, 0, 0, 0, 0, 0), 0),
    "tile": ((-0.03, 0.30, -0.08, -0.23, -0.02, 1.33, -3.17), -0.271),
    "s2": ((-0.05, 0.15, -0.03, -0.44, 0.13, 1.33, -0.89), 0.029),
    "featup": ((-0.07, 0.14, 0.23, -0.07, 0.14, 0.32, -1.58), -0.127),
    "featsharp": ((0.06, 0.16, 0.83, 0.13, 0.17, 0.93, 0.43), 0.387),
}


def row(
    model: str, benchmark: str, figures: Mapping[str, float], seed: int = 0, *lower: str
) -> dict[str, Any]:
    return {
        "model": model,
        "benchmark": benchmark,
        "seed": seed,
        "figures": dict(figures),
        "lower_is_better": list(lower),
    }


@pytest.mark.parametrize("name", PRINTED)
def test_the_printed_rows_come_out(name: str) -> None:
    rows = [row("baseline", group, {"score": 50.0}) for group in GROUPS]
    if name != "baseline":
        changes = zip(GROUPS, PRINTED[name][0], strict=True)
        rows += [row(name, group, {"score": 50 * (1 + c / 100)}) for group, c in changes]
    found = relative_changes(rows, "baseline", {}).models[name]
    assert round(found.total.mean, 3) == PRINTED[name][1]
    by_group = [change.mean for change in found.groups.values()]
    assert by_group == pytest.approx(PRINTED[name][0])


def test_a_slow_count_gives_the_same_with_errors_seeds_and_groups_of_unequal_size() -> None:
    chance = random.Random(0)
    rows = [
        row(model, "nyu", {"miou": chance.uniform(40, 60), "rmse": chance.uniform(0.4, 0.7)}, seed)
        | {"lower_is_better": ["rmse"]}
        for model in ("old", "new")
        for seed in (0, 1, 2)
    ]
    rows += [row(model, "knn", {"top1": chance.uniform(60, 80)}) for model in ("old", "new")]
    groups = {"dense": ["nyu.rmse", "nyu"], "classification": ["knn"]}
    found = relative_changes(rows, "old", groups)

    def average(model: str, benchmark: str, figure: str) -> float:
        own = [r for r in rows if r["model"] == model and r["benchmark"] == benchmark]
        return sum(r["figures"][figure] for r in own) / len(own)

    miou, rmse, top1 = (
        (average("new", *task) - average("old", *task)) / average("old", *task)
        for task in (("nyu", "miou"), ("nyu", "rmse"), ("knn", "top1"))
    )
    dense, classification = 100 * (miou - rmse) / 2, 100 * top1
    new = found.models["new"]
    assert new.groups["dense"].mean == pytest.approx(dense, rel=1e-12)
    assert new.groups["classification"].mean == pytest.approx(classification, rel=1e-12)
    assert new.total.mean == pytest.approx((dense + classification) / 2, rel=1e-12)
    assert found.tasks == {"dense": ["nyu.rmse", "nyu.miou"], "classification": ["knn.top1"]}

    totals = []
    for seed in (0, 1, 2):
        old, now = (
            next(
                r["figures"]
                for r in rows
                if (r["model"], r["seed"]) == (m, seed) and "miou" in r["figures"]
            )
            for m in ("old", "new")
        )
        better = (now["miou"] - old["miou"]) / average("old", "nyu", "miou")
        worse = (now["rmse"] - old["rmse"]) / average("old", "nyu", "rmse")
        totals.append((100 * (better - worse) / 2 + classification) / 2)
    assert new.total.mean == pytest.approx(statistics.mean(totals), rel=1e-12)
    assert new.total.spread == pytest.approx(statistics.stdev(totals), rel=1e-12)


def seeded(model: str, figures: Mapping[int, float]) -> list[dict[str, Any]]:
    return [row(model, "camvid", {"miou": value}, seed) for seed, value in figures.items()]


def test_what_a_seed_does_to_both_is_not_in_the_spread() -> None:
    rows = [*seeded("old", {0: 40, 1: 50, 2: 60}), *seeded("new", {0: 41, 1: 51, 2: 61})]
    change = relative_changes(rows, "old", {}).models["new"].total
    assert change.mean == pytest.approx(2)
    assert change.spread == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (1, 2, 3)])
def test_seeds_that_are_not_the_same_are_not_paired(seeds: tuple[int, ...]) -> None:
    rows = [*seeded("old", {0: 40, 1: 50, 2: 60}), *seeded("new", dict.fromkeys(seeds, 55.0))]
    assert relative_changes(rows, "old", {}).models["new"].total == (pytest.approx(10), None)


def test_one_seed_has_no_spread() -> None:
    rows = [*seeded("old", {0: 50}), *seeded("new", {0: 55})]
    assert relative_changes(rows, "old", {}).models["new"].total == (pytest.approx(10), None)


def test_the_table_marks_the_best_and_says_what_is_in_a_group() -> None:
    rows = [*seeded("old", {0: 40, 1: 60}), *seeded("new", {0: 41, 1: 61})]
    rows += [*seeded("bad", {0: 30, 1: 70}), *seeded("short", {0: 30})]
    table = change_table(relative_changes(rows, "old", {"dense": ["camvid"]}))
    assert table.columns == ("model", "dense", "Delta_m")
    shown = {name: [(cell.text, cell.best) for cell in cells] for name, cells in table.rows}
    assert shown["old"] == [("0", False)] * 2
    assert shown["new"] == [("+2.00 ± 0.00", True)] * 2
    assert shown["bad"] == [("+0.00 ± 28.28", False)] * 2
    assert shown["short"] == [("-40.00", False)] * 2
    assert table.note == "dense: camvid.miou"


def test_groups_of_older_recipes_find_metrics_that_are_in_snake_case_now() -> None:
    rows = [
        row(model, "coco", {"ap": 1, "ap_small": value})
        for model, value in (("old", 2), ("new", 4))
    ]
    found = relative_changes(rows, "old", {"detection": ["coco.AP small"]})
    assert found.tasks == {"detection": ["coco.ap_small"]}
    assert found.models["new"].total.mean == pytest.approx(100)


@pytest.mark.parametrize(
    "item, expected",
    [
        ("nyu", ("nyu", None)),
        ("nyu.rmse", ("nyu", "rmse")),
        ("nyu.v2", ("nyu.v2", None)),
        ("nyu.v2.recall@0.1", ("nyu.v2", "recall@0.1")),
    ],
)
def test_names_of_tasks_may_have_dots(item: str, expected: tuple[str, str | None]) -> None:
    assert split_task("groups", item, ["nyu", "nyu.v2"]) == expected


@pytest.mark.parametrize(
    "baseline, groups, message",
    [
        ("olt", {}, r"baseline: there is no model 'olt' \(did you mean 'old'\?\).*are old, new"),
        ("old", {"g": ["camvit"]}, r"groups.g: there is no benchmark 'camvit' .*mean 'camvid'"),
        ("old", {"g": ["camvid.miuo"]}, r"groups: camvid: there is no metric 'miuo' .*mean 'miou'"),
        (
            "old",
            {"g": ["half"]},
            r"model 'new' was not measured at half.miou; measure it",
        ),
        ("old", {"g": ["zero"]}, r"baseline: 'old' has 0 at zero.miou"),
        ("old", {"g": ["below"]}, r"baseline: 'old' has -2 at below.miou"),
    ],
)
def test_what_cannot_be_compared_is_named(
    baseline: str, groups: dict[str, list[str]], message: str
) -> None:
    rows = [*seeded("old", {0: 50}), *seeded("new", {0: 55})]
    rows += [row("old", "half", {"miou": 1}), row("new", "half", {"other": 1})]
    rows += [row(model, "zero", {"miou": 0}) for model in ("old", "new")]
    rows += [row(model, "below", {"miou": -2}) for model in ("old", "new")]
    with pytest.raises(RecipeError, match=message):
        relative_changes(rows, baseline, groups)
