"""Starting the engine loads nothing that a run does not need."""

import sys
from datetime import timedelta

import pytest
import torch

from distill.engine.deepspeed_library import groups_that_wait
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.process


def modules_of_deepspeed() -> tuple[bool, str]:
    """Of a process that has called `import_deepspeed`."""
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # noqa: F401

    return "torch._inductor.compile_fx" in sys.modules, compiler.compile.__module__


def test_deepspeeds_muon_is_loaded_without_torchs_compiler() -> None:
    assert run_on_ranks(1, modules_of_deepspeed) == [(False, "deepspeed.runtime.compiler")]


def limits_of_groups() -> list[float | None]:
    """The limits, in seconds, of the process groups that a library makes while an engine starts."""
    given: list[float | None] = []
    before = torch.distributed.new_group
    torch.distributed.new_group = lambda ranks, timeout=None: given.append(timeout.total_seconds())
    try:
        with groups_that_wait():
            torch.distributed.new_group([0])
            torch.distributed.new_group([0], timeout=timedelta(seconds=7))
    finally:
        torch.distributed.new_group = before
    return given


def test_deepspeeds_groups_wait_as_long_as_the_runs_own() -> None:
    assert run_on_ranks(1, limits_of_groups) == [[60.0, 7.0]]
