"""How fast this machine's processor multiplies in bfloat16, and what follows for a recipe.

A processor without instructions for it (AVX512-BF16, AMX, Arm's BF16) computes it element by
element: a run looks as if it hung. A measurement tells, by products that take milliseconds.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.runtime.errors import RecipeError
from distill.runtime.tracking import log

AUTO = "auto"
SLOW = 1.5  # times the time of float32, from which on bfloat16 is no gain in any part of a run
_SIDES = (128, 512)  # the second only where the first is not hopeless: 0.3 GFLOP
_HOPELESS = 4.0
_REPEATS = 3


@functools.cache
def bf16_to_fp32() -> float:
    """Time of a product of matrices in bfloat16 on the processor, with float32's as the unit.

    It is measured once in a process: the best of a few products, after one to warm up.
    """
    ratio = 0.0
    for side in _SIDES:
        ratio = _seconds(torch.bfloat16, side) / _seconds(torch.float32, side)
        if ratio > _HOPELESS:
            break
    return ratio


def _seconds(dtype: torch.dtype, side: int) -> float:
    matrix, found = torch.ones(side, side, dtype=dtype), []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        matrix @ matrix
        found.append(time.perf_counter() - begin)
    return max(min(found[1:]), 1e-9)


def measured_precision(value: Any) -> Any:
    """The precision that `auto` stands for on this machine; other values as they are.

    That is bf16 on a GPU, and on a processor that is faster in it than in fp32.
    """
    if value != AUTO:
        return value
    return "bf16" if torch.cuda.is_available() or bf16_to_fp32() < 1 else "fp32"


def require_alike(precisions: Sequence[Mapping[str, str]]) -> None:
    """Checks that `auto` is the same on machines of different kinds.

    Args:
        precisions: key of the recipe to its value, of each rank.

    Raises:
        RecipeError: two ranks would compute in different precisions.
    """
    for rank, own in enumerate(precisions):
        for key, value in own.items():
            first = precisions[0][key]
            if value != first:
                raise RecipeError(
                    f"{key}: auto is {first} on rank 0 and {value} on rank {rank}, by what their "
                    f"machines are faster in; set {key}=fp32, or bf16"
                )


def bf16_line(precisions: Mapping[str, str]) -> str | None:
    """What this machine's processor makes of the precisions of a recipe.

    Args:
        precisions: key of the recipe to its value.

    Returns:
        A sentence if the processor computes, and a key is bf16; else None.
    """
    keys = [key for key, value in precisions.items() if value == "bf16"]
    if not keys or torch.cuda.is_available():
        return None
    ratio = bf16_to_fp32()
    times = f"{ratio:.0f}" if ratio > 9 else f"{ratio:.1f}"
    line = f"in bf16 this processor takes {times} times as long for a product as in fp32"
    return f"{line}; set {' '.join(f'{key}=fp32' for key in keys)}" if ratio > SLOW else line


def warn_of_slow_bf16(precisions: Mapping[str, str]) -> None:
    """Warns once, on rank 0, if the precisions of a recipe are slow here; see `bf16_line`."""
    line = bf16_line(precisions)
    if line is not None and bf16_to_fp32() > SLOW:
        log.warning("%s", line)
