"""No network and no GPU in tests; torchvision is repaired before any test imports timm.

`pytest -m gpu`, written so, runs what needs a GPU, and that alone; everything else is about the
CPU, also where there is a GPU. Triton's kernels are interpreted there.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs two processes
# Processes that tests start find this project and `tests` from any folder.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)

import teachers  # noqa: F401
from distill.evaluation.kinds import register_evaluation_kinds
from tests.guards import Guards

register_evaluation_kinds()  # as a command does when it starts

# Files that train or start processes: first, so that no worker is left with them at the end.
_LONG = (
    *("test_run_", "test_teachers_trained", "test_teachers_catalog", "test_training_partitions"),
    *("test_distill_export", "test_tasks_upsampler_task", "readme"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Guards())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within each half the order stays."""
    items.sort(key=lambda item: not any(part in item.path.name for part in _LONG))


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """What `say_once` has said since the last call, as if it had said nothing before the test."""
    monkeypatch.setattr("teachers.messages._said", set())

    def messages() -> list[str]:
        found = [each.getMessage() for each in caplog.records if each.name == "teachers"]
        caplog.clear()
        return found

    return messages
