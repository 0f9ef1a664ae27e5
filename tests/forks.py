"""Processes forked from a server that has torch, DeepSpeed and this project loaded.

To start Python and import them takes five seconds of CPU time; a fork has them. Everything else is
as in a process of its own: environment, folder, signals, output, exit code. What a fork cannot
show, the imports themselves and the `deepspeed` launcher, has tests that start a fresh Python.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Fork:
    """A running `python -m MODULE [ARGUMENT ...]`, with the methods of `subprocess.Popen`.

    Args:
        command: the interpreter, `-m`, the module and its arguments.
        folder: the process's current directory.
        environment: all of its environment variables.
        killed_at: the process kills itself as `kill -9` does, at the moment when it is about to
            open, make or rename a path that contains this text; None for never.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        environment: dict[str, str],
        killed_at: str | None = None,
    ) -> None:
        self._command = command
        self._outputs = [tempfile.NamedTemporaryFile("r") for _ in ("stdout", "stderr")]  # noqa: SIM115
        paths = [file.name for file in self._outputs]
        arguments = (command, folder, environment, killed_at, *paths)
        self._process = CONTEXT.Process(target=_main, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; minus the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def outputs(self) -> tuple[str, str]:
        """What the process has written to stdout and to stderr so far."""
        stdout, stderr = (Path(file.name).read_text() for file in self._outputs)
        return stdout, stderr


def _main(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    killed_at: str | None,
    stdout: str,
    stderr: str,
) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    assert "tests.preloaded" in sys.modules, "the fork server could not import it"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    if killed_at is not None:
        sys.addaudithook(functools.partial(_kill_at, killed_at))
    module = command[2]
    sys.argv = command[2:]
    sys.modules.pop(module, None)  # it runs under the name __main__, as `python -m` has it
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _kill_at(text: str, event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.mkdir", "os.rename") and text in f"{arguments[:2]}":
        os.kill(os.getpid(), signal.SIGKILL)
