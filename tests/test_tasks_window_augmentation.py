"""Which windows a step attends within."""

import pytest

from distill.tasks.window_augmentation import WindowAugmentationConfig, draw_window, window_shares

ALWAYS = WindowAugmentationConfig(probability=1.0)


def drawn(config: WindowAugmentationConfig, grid: tuple[int, int], steps: int) -> list[int | None]:
    return [draw_window(config, grid, 0, step) for step in range(steps)]


def test_probability_0_is_never_and_1_always() -> None:
    assert set(drawn(WindowAugmentationConfig(), (24, 24), 50)) == {None}
    assert None not in drawn(ALWAYS, (24, 24), 50)


def test_the_share_of_steps_is_the_probability() -> None:
    found = drawn(WindowAugmentationConfig(probability=0.3), (24, 24), 2000)
    assert sum(x is not None for x in found) / 2000 == pytest.approx(0.3, abs=0.04)


def test_only_sizes_that_divide_both_sides_into_several_windows_are_drawn() -> None:
    assert set(drawn(ALWAYS, (24, 24), 200)) == {6, 8, 12}
    assert set(drawn(ALWAYS, (24, 18), 200)) == {6}
    assert set(drawn(ALWAYS, (16, 32), 200)) == {8, 16}
    assert set(drawn(ALWAYS, (16, 16), 200)) == {8}


def test_a_grid_that_no_size_divides_attends_globally() -> None:
    assert set(drawn(ALWAYS, (13, 26), 20)) == {None}


def test_sizes_are_drawn_evenly() -> None:
    found = drawn(ALWAYS, (24, 24), 3000)
    assert [found.count(s) / 3000 for s in (6, 8, 12)] == pytest.approx([1 / 3] * 3, abs=0.04)


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    """So every rank, whatever its generators have done, draws the same."""
    assert drawn(ALWAYS, (24, 24), 20) == drawn(ALWAYS, (24, 24), 20)
    assert drawn(ALWAYS, (24, 24), 20) != [draw_window(ALWAYS, (24, 24), 1, s) for s in range(20)]


def test_the_shares_are_those_of_the_draws() -> None:
    config = WindowAugmentationConfig(probability=0.6, sizes=(6, 6, 8, 7))
    shares = window_shares(config, (24, 24))
    assert shares == pytest.approx({None: 0.4, 6: 0.4, 8: 0.2})
    found = drawn(config, (24, 24), 3000)
    assert {s: found.count(s) / 3000 for s in shares} == pytest.approx(shares, abs=0.04)
    assert window_shares(config, (13, 26)) == window_shares(WindowAugmentationConfig(), (24, 24))
    assert None not in window_shares(ALWAYS, (24, 24))
