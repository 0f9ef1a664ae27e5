"""How a process of ours starts, and that no watchdog outlives the command that set it."""

import faulthandler
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import train_student, write_targets
from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.process import importing, watchdog
from distill.tasks import cached_targets
from distill.training import session
from distill.training.training_recipe import resolved
from tests.test_training_arms import recipe

COMMANDS = ("evaluate", "export", "push", "train_student", "train_upsampler", "visualize")
HEAVY = ("timm", "open_clip", "deepspeed", "matplotlib", "wandb", "torch._dynamo")


@pytest.mark.process
def test_no_command_imports_a_heavy_library_before_it_knows_what_it_is_asked() -> None:
    """So that `--help` takes hardly longer than torch."""
    modules = ", ".join([*(f"distill.{command}" for command in COMMANDS), "teachers.dry_run"])
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_imports_run_without_the_garbage_collector_which_comes_back_whatever_happens() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    with pytest.raises(KeyError), importing():
        raise KeyError
    assert gc.isenabled()
    gc.unfreeze()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The limits that the watchdog gets, one after the other; None where it is switched off."""
    given: list[float | None] = []
    arm, disarm = "dump_traceback_later", "cancel_dump_traceback_later"
    monkeypatch.setattr(faulthandler, arm, lambda seconds, exit: given.append(seconds))
    monkeypatch.setattr(faulthandler, disarm, lambda: given.append(None))
    return given


def test_a_watchdog_is_armed_in_its_block_alone(limits: list[float | None]) -> None:
    with watchdog(None):
        pass
    assert limits == [None]
    with watchdog(7):
        assert limits == [None, 7]
    assert limits == [None, 7, None]


@pytest.mark.parametrize("error", [None, RecipeError("no"), ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize(("module", "work"), [(session, "_train"), (cached_targets, "_write")])
def test_no_command_arms_the_watchdog_around_its_work(
    module: Any,
    work: str,
    error: BaseException | None,
    limits: list[float | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would run out while teachers load, statistics are estimated and caches are written."""

    def work_or_fail(*_: object) -> str:
        assert limits == []
        if error is not None:
            raise error
        return "done"

    made = recipe(resolution=32, batch_size=4, dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(resolved(made)))
    monkeypatch.setattr(module, work, work_or_fail)
    for name in ("connect", "disconnect"):
        monkeypatch.setattr(f"distill.runtime.distributed.{name}", lambda *_: None)
    command = train_student if module is session else write_targets
    folder = [] if module is session else [str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path / "recipe.yaml"), *folder])
    if error is None:
        command.main()
    else:
        with pytest.raises(SystemExit if isinstance(error, RecipeError) else type(error)):
            command.main()
    assert limits == []
