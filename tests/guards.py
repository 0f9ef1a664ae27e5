"""A pytest plugin that fails tests which start processes unmarked or leave the watchdog armed.

`make check` leaves out the tests with the marker `process`. A test without it that starts a process
fails, so that the marker is never forgotten. Plain forks, as of a DataLoader's workers, and calls
of git, which take milliseconds, are free.
"""

import faulthandler
import functools
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any

import pytest

_MARK_IT = "mark it with pytest.mark.process"


class Guards:
    """The plugin."""

    def __init__(self) -> None:
        self._test: pytest.Item | None = None
        self._num_starts = 0
        self._starting_fixtures: set[object] = set()
        self._watchdog_armed = False
        _call_before(subprocess.Popen, "__init__", self._note_command)
        _call_before(SpawnProcess, "start", self._note_start)
        _call_before(ForkServerProcess, "start", self._note_start)
        for name, armed in (("dump_traceback_later", True), ("cancel_dump_traceback_later", False)):
            _call_before(faulthandler, name, functools.partial(self._note, armed))

    def _note_command(self, _: Any, command: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(command, str) or command[0] != "git":
            self._note_start()

    def _note_start(self, *_: Any) -> None:
        self._num_starts += 1
        if self._test is not None and self._test.get_closest_marker("process") is None:
            raise RuntimeError(f"this test starts a process; {_MARK_IT}")

    def _note(self, armed: bool, *_: Any, **options: Any) -> None:
        self._watchdog_armed = armed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test = item
        try:
            return (yield)
        finally:
            self._test = None

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        before = self._num_starts
        try:
            return (yield)
        finally:
            if self._num_starts > before:
                self._starting_fixtures.add(fixturedef)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        """Also refuses fixtures that started their processes for an earlier, marked test."""
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        starts = any(definitions[-1] in self._starting_fixtures for definitions in fixtures)
        if starts and item.get_closest_marker("process") is None:
            pytest.fail(f"a fixture of this test starts a process; {_MARK_IT}")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """An armed watchdog would end pytest itself minutes later."""
        if self._watchdog_armed:
            faulthandler.cancel_dump_traceback_later()
            pytest.fail("the watchdog is still armed")


def _call_before(owner: Any, name: str, before: Callable[..., None]) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return function(*arguments, **options)

    setattr(owner, name, wrapped)
