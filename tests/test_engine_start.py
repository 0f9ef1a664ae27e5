"""Starting the engine loads nothing that a run does not need."""

import sys

import pytest

from tests.ranks import run_on_ranks

pytestmark = pytest.mark.process


def modules_of_deepspeed() -> tuple[bool, str]:
    """Of a process that has called `import_deepspeed`."""
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # noqa: F401

    return "torch._inductor.compile_fx" in sys.modules, compiler.compile.__module__


def test_deepspeeds_muon_is_loaded_without_torchs_compiler() -> None:
    assert run_on_ranks(1, modules_of_deepspeed) == [(False, "deepspeed.runtime.compiler")]
