"""Requests to stop: what ends at once, what ends between two steps, and what is left afterwards."""

import os
import signal
import time

import pytest

from distill.runtime import stopping
from distill.runtime.command import command
from distill.runtime.stopping import Stopped, agreed_steps, interruptible, listening

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


def ask(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@SIGNALS
def test_interruptible_work_ends_at_once(number: int) -> None:
    done = []

    def work() -> None:
        with listening(), interruptible():
            ask(number)
            time.sleep(60)
            done.append("slept")

    with pytest.raises(Stopped):
        work()
    assert not done


@SIGNALS
def test_signals_have_their_former_effect_afterwards(number: int) -> None:
    before = signal.getsignal(number)
    with listening():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_request_waits_for_work_that_is_not_interruptible() -> None:
    done = []

    def work() -> None:
        with listening() as stop:
            ask()
            done.append("saved")
            assert stop
            with interruptible():
                done.append("measured")

    with pytest.raises(Stopped):
        work()
    assert done == ["saved"]


def test_steps_come_to_their_end_but_for_the_first() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(asked_at: int) -> None:
        begun.clear(), ended.clear()
        with listening():
            for step in agreed_steps(range(5)):
                begun.append(step)
                if step == asked_at:
                    ask()
                ended.append(step)

    for asked_at, whole in ((0, []), (2, [0, 1, 2])):
        with pytest.raises(Stopped):
            work(asked_at)
        assert ended == whole
        assert begun[-1] == asked_at
    work(9)
    assert ended == [0, 1, 2, 3, 4]


def test_what_is_kept_after_agreed_steps_is_not_interrupted() -> None:
    """Though the steps are part of work that is interruptible."""
    kept = []

    def work() -> None:
        with listening(), interruptible():
            try:
                for step in agreed_steps(range(5)):
                    if step == 2:
                        ask()
            except Stopped:
                time.sleep(2.5)
                kept.append("sums")
                raise

    with pytest.raises(Stopped):
        work()
    assert kept == ["sums"]


def test_a_step_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_PATIENCE_S", 0.5)

    done = []

    def work() -> None:
        with listening():
            for step in agreed_steps(range(5)):
                if step == 2:
                    ask()
                    time.sleep(60)
                done.append(step)

    with pytest.raises(Stopped):
        work()
    assert done == [0, 1]


def test_where_no_command_listens_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        assert list(agreed_steps(range(3))) == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_fails_because_a_rank_has_left_is_a_stop_too() -> None:
    def work() -> None:
        with listening(), interruptible():
            try:
                ask()
                time.sleep(60)
            finally:
                raise RuntimeError("connection closed by peer")

    with pytest.raises(Stopped):
        work()


def test_a_command_that_is_stopped_ends_with_0_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @command
    def main() -> None:
        with listening(), interruptible():
            ask()
            time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().err.startswith("stopped on request; what is complete is kept")
