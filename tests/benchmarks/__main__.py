"""`python -m tests.benchmarks`: every benchmark, then one table of what is due and what came.

The exit code is 1 where a target is missed. The machine should do nothing else meanwhile.
"""

import importlib
import os
import sys
from pathlib import Path

from tests.benchmarks.figure import Figure


def main() -> int:
    """Runs the `main` of every `bench_*` module beside this one, each in its turn."""
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
