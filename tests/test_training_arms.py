"""Arms: shares of the loss, ranks and passes, and the words of each mistake."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import StudentRecipe
from distill.training.training_recipe import resolved

LOW = {"resolution": 64, "batch_size": 12, "micro_batch_size": 2}
HIGH = {"resolution": 128, "batch_size": 4, "micro_batch_size": 1, "teachers": ["clip"]}


def recipe(arms: dict[str, Any] | None = None, **run: Any) -> StudentRecipe:
    tree = {
        "run": {"dir": "unused", "steps": 100, **run},
        "data": {"sources": [{"shards": "unused"}]},
        "teachers": {
            "clip": {"kind": "dfn_clip", "model": "clip_ti16_128"},
            "siglip": {"kind": "siglip", "model": "siglip_ti16_128"},
        },
        "student": {"size": "tiny"},
        "arms": {} if arms is None else arms,
    }
    return validate(StudentRecipe, tree, "recipe")


def two_arms(
    low: dict[str, Any] | None = None, high: dict[str, Any] | None = None
) -> StudentRecipe:
    return recipe({"low": {**LOW, **(low or {})}, "high": {**HIGH, **(high or {})}})


PARTED = ({"ranks": 3, "micro_batch_size": 2}, {"ranks": 1, "micro_batch_size": 2})


@pytest.mark.parametrize(
    ("ranks", "own"), [(1, False), (2, False), (1, True), (4, True), (8, True)]
)
def test_the_shares_of_all_passes_of_all_ranks_sum_to_one(ranks: int, own: bool) -> None:
    made = two_arms(*PARTED) if own else two_arms({"weight": 3.0})
    plan = made.step_plan(ranks)
    passes = [one for rank in range(ranks) for one in plan.micro_batches(rank, 5)]
    assert sum(one.share for one in passes) == pytest.approx(1)
    for teacher in ("clip", "siglip"):
        assert sum(one.shares.get(teacher, 0) for one in passes) == pytest.approx(1)
    for arm in ("low", "high"):
        assert sum(one.arm_share for one in passes if one.arm == arm) == pytest.approx(1)


def test_a_teachers_loss_is_the_mean_over_the_images_that_it_sees() -> None:
    """CLIP sees 12 small images and 4 large ones, SigLIP the small ones; a large one counts 3."""
    low, *_, high = two_arms(high={"weight": 3.0}).step_plan(1).micro_batches(0, 0)
    assert (low.arm, high.arm) == ("low", "high")
    assert low.shares == pytest.approx({"clip": 2 / 24, "siglip": 2 / 12})
    assert high.shares == pytest.approx({"clip": 3 / 24})
    assert (low.share, high.share) == pytest.approx((2 / 24, 3 / 24))


def test_ranks_of_their_own_run_their_arm_and_its_teachers_only() -> None:
    plan = two_arms(*PARTED).step_plan(8)
    passes = [{one.arm for one in plan.micro_batches(rank, 0)} for rank in range(8)]
    assert passes == [{"low"}] * 6 + [{"high"}] * 2
    assert plan.teachers_of(0) == {"clip", "siglip"}
    assert plan.teachers_of(7) == {"clip"}
    assert Counter(plan.images_of(0)) == {"clip": 16, "siglip": 12}


def test_one_process_runs_all_arms_in_turn() -> None:
    plan = two_arms(*PARTED).step_plan(1)
    assert [one.arm for one in plan.micro_batches(0, 0)] == ["low"] * 6 + ["high"] * 2
    assert plan.teachers_of(0) == {"clip", "siglip"}


def test_which_images_an_arm_gets_does_not_depend_on_the_ranks() -> None:
    made = two_arms(*PARTED)
    alone, shared = made.step_plan(1), made.step_plan(4)
    for step in range(3):
        one = {(p.arm, p.first) for p in alone.micro_batches(0, step)}
        four = [(p.arm, p.first) for rank in range(4) for p in shared.micro_batches(rank, step)]
        assert set(four) == one
        assert len(four) == len(one)
    assert alone.layout.identity == shared.layout.identity


def test_each_size_has_its_batch() -> None:
    sizes = [
        {"size": 64, "probability": 0.5},
        {"size": 128, "probability": 0.5, "batch_size": 4, "micro_batch_size": 2},
    ]
    plan = recipe(resolution=sizes, batch_size=12, micro_batch_size=3).step_plan(2)
    seen = {
        (
            part.resolution[0],
            part.batch_size,
            len(plan.micro_batches(1, step)),
            plan.micro_batches(1, step)[0].images,
        )
        for step in range(32)
        for part in plan.layout.sub_batches(step)
    }
    assert seen == {(64, 12, 2, 3), (128, 4, 1, 2)}


def test_the_identity_of_a_plain_recipe_is_its_size_and_batch() -> None:
    plan = recipe(resolution=64, batch_size=8).step_plan(2)
    assert plan.layout.identity == {"resolution": [64, 64], "batch_size": 8}


def test_routes_of_an_arm_go_before_those_of_all() -> None:
    made = two_arms(low={"routes": {"clip": "interpolate"}})
    made = made.model_copy(
        update={"targets": made.targets.model_copy(update={"routes": {"clip": "matched"}})}
    )
    low, *_, high = made.step_plan(1).micro_batches(0, 0)
    assert low.routes == {"clip": "interpolate", "siglip": "auto"}
    assert high.routes == {"clip": "matched"}


@pytest.mark.parametrize("made", [two_arms(*PARTED), recipe(resolution=[64, 96], batch_size=4)])
def test_a_resolved_recipe_loads_again_as_itself(made: StudentRecipe) -> None:
    assert validate(StudentRecipe, resolved(made), "resolved") == made


@pytest.mark.parametrize(
    ("arms", "run", "message"),
    [
        (
            {"low": {**LOW, "teachers": ["clop"]}},
            {},
            r"arms.low.teachers.clop: no such teacher \(did you mean 'clip'\?\); there are clip, s",
        ),
        (
            {"low": {**LOW, "routes": {"sam": "mosaic"}}},
            {},
            "arms.low.routes.sam: no such teacher; there are clip, siglip",
        ),
        (
            {"high": HIGH},
            {},
            "teachers.siglip: no arm names it; add it to the teachers of an arm, or remove it",
        ),
        ({"low": LOW}, {"batch_size": 4}, "run.batch_size: the recipe has arms"),
        ({"low": LOW}, {"resolution": 32}, "run.resolution: the recipe has arms"),
        (None, {"resolution": 32}, "run.batch_size: required, but not given, because .* no arms"),
        (None, {"batch_size": 32}, "run.resolution: required, but not given, because .* no arms"),
        ({"a-b": LOW}, {}, "arms.a-b: an arm's name is letters, digits and _"),
        (
            {"low": {**LOW, "ranks": 1}, "high": HIGH},
            {},
            "arms.high.ranks: other arms have ranks of their own; set it in every arm, or in",
        ),
        (
            {"low": {**LOW, "resolution": [{"size": 64}, {"size": [64, 100]}]}},
            {},
            r"arms.low.resolution.1.size: expected .* got \[64, 100\]; the nearest are \[64, 96\]",
        ),
        ({"low": {**LOW, "weigth": 1}}, {}, r"arms.low.weigth: unknown key \(did you mean 'weight"),
        (
            {"low": {**LOW, "routes": {"clip": "mosiac"}}},
            {},
            r"arms.low.routes.clip: .*'mosaic'.*got 'mosiac' \(did you mean 'mosaic'\?\)",
        ),
    ],
)
def test_each_mistake_says_where_and_how_to_mend_it(
    arms: dict[str, Any] | None, run: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(arms, **run)


@pytest.mark.parametrize(
    ("low", "high", "ranks", "message"),
    [
        ({}, {}, 3, "arms.high.batch_size: 4 images do not divide over 3 ranks; use 3 or 6"),
        (
            {"micro_batch_size": 5},
            {},
            1,
            r"arms.low.micro_batch_size: 5 does not divide a rank's share of 12 .* that does is 4",
        ),
        (
            {"resolution": [{"size": 64}, {"size": 32, "batch_size": 7}]},
            {},
            2,
            "arms.low.resolution.1.batch_size: 7 images do not divide over 2 ranks; use 6 or 8",
        ),
        (
            *PARTED,
            6,
            r"arms: partitions of 3 \(low\) \+ 1 \(high\) do not fit 6 ranks; start 4 or 8 "
            "ranks, or one, which runs all arms in turn",
        ),
        (*PARTED, 2, r"do not fit 2 ranks; start 4 ranks, or one"),
        (
            {"ranks": 1},
            {"ranks": 1},
            2,
            r"as many micro-batches a step, got arms.low 6 \(12 images at 64 x 64 px over 1 ranks, "
            r"2 a micro-batch\), arms.high 4 \(4 images .*; change their micro_batch_size",
        ),
    ],
)
def test_ranks_and_batches_that_do_not_fit_say_which_do(
    low: dict[str, Any], high: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        two_arms(low, high).require_ranks(ranks)


def test_the_largest_size_is_that_of_all_arms() -> None:
    assert two_arms().largest_resolution == (128, 128)
    assert recipe(resolution=[64, 96], batch_size=1).largest_resolution == (64, 96)
    assert two_arms().run.dir == Path("unused")
