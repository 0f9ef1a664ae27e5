"""Resolution schedules: what is drawn, when, and the words of each mistake."""

import os
from collections import Counter
from unittest.mock import patch

import pytest
from pydantic import BaseModel, ConfigDict

from distill.runtime.config import dump_yaml, validate
from distill.runtime.errors import RecipeError
from distill.training.resolution import ResolutionSchedule, SizeConfig


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")

    resolution: ResolutionSchedule


def schedule(value: object) -> ResolutionSchedule:
    return validate(Recipe, {"resolution": value}, "recipe").resolution


MIXED = [{"size": 128, "probability": 0.25}, {"size": [96, 64], "probability": 0.75}]


@pytest.mark.parametrize("written", [432, [256, 384], MIXED, [{"size": 128, "batch_size": 4}]])
def test_a_schedule_is_dumped_as_it_loads(written: object) -> None:
    made = schedule(written)
    dumped = Recipe(resolution=made).model_dump(mode="json")
    assert schedule(dumped["resolution"]) == made
    assert dump_yaml(dumped)
    if isinstance(written, int):
        assert dumped["resolution"] == [written, written]


def test_one_size_is_fixed_and_a_set_is_not() -> None:
    assert schedule(432).fixed == (432, 432)
    assert schedule([256, 384]).fixed == (256, 384)
    assert schedule(MIXED).fixed is None
    assert schedule([{"size": 432, "batch_size": 4}]).fixed is None


def test_sizes_are_drawn_with_their_probabilities() -> None:
    """Of 4000 draws with probability 1/4, more than 4 standard deviations would be 110 off."""
    sizes = Counter(schedule(MIXED).draw(step, 7).size for step in range(4000))
    assert abs(sizes[128, 128] - 1000) < 110
    assert sizes[128, 128] + sizes[96, 64] == 4000


def test_without_probabilities_sizes_share_alike() -> None:
    three = schedule([{"size": 32}, {"size": 64}, {"size": 96}])
    sizes = Counter(three.draw(step, 7).size[0] for step in range(3000))
    assert all(abs(sizes[side] - 1000) < 110 for side in (32, 64, 96))


def test_a_draw_depends_on_seed_arm_and_step_and_on_nothing_else() -> None:
    made = schedule(MIXED)
    drawn = [made.draw(step, 7, "low") for step in range(64)]
    with patch.dict(os.environ, RANK="3", WORLD_SIZE="4"):
        assert [made.draw(step, 7, "low") for step in reversed(range(64))] == drawn[::-1]
    assert [made.draw(step, 8, "low") for step in range(64)] != drawn
    assert [made.draw(step, 7, "high") for step in range(64)] != drawn


def test_stages_follow_each_other_at_their_steps() -> None:
    made = schedule([{"size": 256, "end": 10}, {"size": 432, "start": 10}])
    assert [made.draw(step, 0).size[0] for step in (0, 9, 10, 99)] == [256, 256, 432, 432]


def test_a_stage_may_be_a_set() -> None:
    made = schedule(
        [
            {"size": 128, "end": 8},
            {"size": 256, "start": 8, "probability": 0.5},
            {"size": 512, "start": 8, "probability": 0.5},
        ]
    )
    assert {made.draw(step, 0).size[0] for step in range(8)} == {128}
    assert {made.draw(step, 0).size[0] for step in range(8, 64)} == {256, 512}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            [{"size": 32, "probability": 0.5}],
            r"resolution: .*probabilities at step 0 are \[0.5\]",
        ),
        (
            [{"size": 32, "probability": 0.5}, {"size": 64}],
            r"\[0.5, None\]; they must sum to 1, or none may be given",
        ),
        ([{"size": 32, "end": 5}], "no size for step 5; let another stage start there"),
        ([{"size": 32, "start": 2}], "no size for step 0"),
        (
            [{"size": 32, "end": 5}, {"size": 64, "start": 6}],
            "no size for step 5; let another stage start there, or remove `end`",
        ),
        ([{"size": 32, "start": 5, "end": 5}], "resolution.0: end: 5 is not after .* start, 5"),
        ([{"side": 32}], r"resolution.0.side: unknown key \(did you mean 'size'\?\)"),
        ("large", "resolution.0.size: .*got 'large'"),
        (0, "resolution.0.size.0: .*greater than 0"),
    ],
)
def test_each_mistake_says_where_and_what_is_due(written: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        schedule(written)


def test_a_size_is_part_of_its_stage_only() -> None:
    size = SizeConfig(size=(32, 32), start=2, end=4)
    assert [size.at(step) for step in range(5)] == [False, False, True, True, False]
