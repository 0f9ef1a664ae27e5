"""The learning-rate schedule."""

import pytest

from distill.engine.schedule import ScheduleConfig, scheduled_ratio

COSINE = ScheduleConfig(warmup_steps=4, final_ratio=0.1)


def test_warmup_rises_linearly_to_the_peak() -> None:
    ratios = [scheduled_ratio(COSINE, step, 104) for step in range(5)]
    assert ratios == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_halfway_in_the_middle_and_ends_at_the_final_ratio() -> None:
    assert scheduled_ratio(COSINE, 54, 104) == pytest.approx(0.55)
    assert scheduled_ratio(COSINE, 104, 104) == pytest.approx(0.1)
    assert scheduled_ratio(COSINE, 200, 104) == pytest.approx(0.1)


def test_constant_stays_at_the_peak() -> None:
    config = ScheduleConfig(kind="constant")
    assert {scheduled_ratio(config, step, 10) for step in range(10)} == {1.0}


def test_linear_falls_by_equal_steps_to_almost_nothing() -> None:
    config = ScheduleConfig(kind="linear", warmup_steps=1)
    ratios = [scheduled_ratio(config, step, 5) for step in range(5)]
    assert ratios == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])
