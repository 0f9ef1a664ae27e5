"""Kills a small run twenty times at random moments and compares its end with an uninterrupted one.

    python -m tests.kill_often [--kills 20] [--ranks 2] [--seed 0]

Half of the kills wait for a checkpoint that is being written (`.tmp-...`). Prints one
line a kill and, at the end, whether weights, average and metrics are the same to the last bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distill.runtime.checkpoint import find_checkpoints
from tests.tiny_run import (
    assert_same_weights,
    environment,
    launcher_command,
    run,
    wait_for_metrics,
    write_recipe,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    steps = 8 * options.kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(
            folder, run={"steps": steps}, tracking={"every": 4}, checkpoint={"every": 2}
        )
        straight = f"run.dir={folder / 'straight'}"
        done = run(launcher_command(recipe, straight, ranks=options.ranks), folder)
        assert done.returncode == 0, done.stderr
        for number in range(options.kills):
            _kill(number, recipe, folder, options.ranks, generator)
        done = run(launcher_command(recipe, ranks=options.ranks), folder)
        assert done.returncode == 0, done.stderr
        assert_same_weights(folder / "straight", folder / "run", steps)
    print(f"{options.kills} kills, {options.ranks} ranks: the last weights are the same bits")


def _kill(number: int, recipe: Path, folder: Path, ranks: int, generator: random.Random) -> None:
    process = subprocess.Popen(
        launcher_command(recipe, ranks=ranks),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_metrics(folder / "run", process)
    in_save = number % 2 == 0
    if in_save:
        _wait_for_save(folder / "run/checkpoints", process)
        time.sleep(generator.uniform(0.0, 0.05))
    else:
        time.sleep(generator.uniform(0.0, 0.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = find_checkpoints(folder / "run/checkpoints")
    moment = "in a save" if in_save else "at a random moment"
    newest = left[0].name if left else "none"
    print(f"kill {number + 1}: {moment}; newest whole checkpoint: {newest}", flush=True)


def _wait_for_save(root: Path, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        if any(path.name.startswith(".tmp-") for path in root.glob(".tmp-*")):
            return
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
