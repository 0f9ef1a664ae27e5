"""How long a run takes from its launch to its first optimiser step.

    python -m tests.benchmarks.bench_start

The workload of `workload.py` under the `deepspeed` launcher: imports, the index of the shards, the
teachers, their statistics over one batch of images, the engine, one step. The first run is not
counted: it finds the disk cold. Target: under 10 s.
"""

import statistics
import tempfile
from pathlib import Path

from distill.run_folder import STATUS
from tests.benchmarks.figure import Figure
from tests.benchmarks.workload import launch, write_workload
