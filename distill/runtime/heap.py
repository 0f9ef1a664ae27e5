"""Memory that a step has freed stays with the process for the next one, where the CPU computes.

glibc maps blocks above 32 MB afresh each time and gives them back when they are freed, and the
kernel clears every page again: for a CNN's activations that takes longer than its arithmetic.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes malloc reuse what was freed, for the rest of the process.

    The process keeps the most that it ever needed, and some percent more. Linux with glibc only.

    Returns:
        Whether it does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
