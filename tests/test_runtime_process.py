"""How a process of ours starts."""

import gc
import subprocess
import sys

import pytest

from distill.runtime.process import importing

COMMANDS = ("evaluate", "export", "train_student", "train_upsampler", "visualize")
HEAVY = ("timm", "open_clip", "deepspeed", "matplotlib", "wandb", "torch._dynamo")


def test_no_command_imports_a_heavy_library_before_it_knows_what_it_is_asked() -> None:
    """So that `--help` takes hardly longer than torch."""
    modules = ", ".join(f"distill.{command}" for command in COMMANDS)
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
