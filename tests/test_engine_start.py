"""Starting the engine loads nothing that a run does not need."""

import subprocess
import sys

PROGRAM = """
import sys
from distill.engine.deepspeed_library import import_deepspeed
import_deepspeed()
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert compiler.compile.__module__ == "deepspeed.runtime.compiler"
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_deepspeeds_muon_is_loaded_without_torchs_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.split()[-1] == "False"
