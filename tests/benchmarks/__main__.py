"""`python -m tests.benchmarks`: runs every benchmark, then prints all figures beside their targets.

Exits with code 1 if a target is missed. Nothing else should run on the machine meanwhile.
"""

import importlib
import os
import sys
from pathlib import Path

from tests.benchmarks.figure import Figure


def main() -> int:
    """Runs the `main` of every `bench_*` module in this folder, one after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that they start
    sys.argv = sys.argv[:1]
    figures: list[Figure] = []
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"\n{path.stem}", flush=True)
        figures += importlib.import_module(f"tests.benchmarks.{path.stem}").main()
    print("\n" + "\n".join(figure.line() for figure in figures))
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
