"""The speed and memory of training, and the share of time of each kind of work."""

import resource
import time
from pathlib import Path

import torch

from distill.runtime import distributed, timing


class SpeedMeter:
    """Measures since it was last restarted; the clock times this process's kinds of work."""

    def __init__(self, clock: timing.Clock) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured."""
        self._start, self.images = time.perf_counter(), 0
        self._clock.restart()

    def read(self) -> dict[str, float]:
        """Metrics of all ranks; every rank must call this."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {
            "images_per_s": self.images / seconds,
            "peak_memory_gb": _peak_memory() / 1e9,
            **timing.shares(distributed.gather_objects(self._clock.read())),
        }


def _peak_memory() -> float:
    """Bytes: of the GPU's allocator, or of this process where there is no GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # Not ru_maxrss, which on Linux starts at the parent's peak.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return float(lines["VmHWM"].split()[0]) * 1024
