"""Time and memory of joint bilateral upsampling, compared with unfolded neighbourhoods.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_jbu

4x, from 27 x 27 to 108 x 108 cells, with guidance of 384 px. Both forms take turns in one process
on one thread; the ratios are of medians of process CPU time. At 1152 channels the unfolded form
works in groups of 128, as it would need 5 GB otherwise. Peak memory is what one call adds, in a
process of its own. Our result is in channels_last format, the unfolded form's is contiguous.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teachers.upsamplers.guidance import area_resize
from teachers.upsamplers.jbu import JBU
from tests.benchmarks.figure import Figure
from tests.test_teachers_jbu import published_filter, published_kernels

SIDE, PIXELS, GROUP = 27, 384, 128
OURS_A_ROUND = 7  # one call of the unfolded form lasts longer than all of these
Form = Callable[[JBU, Tensor, Tensor], Tensor]


def ours(jbu: JBU, source: Tensor, guide: Tensor) -> Tensor:
    """Our form."""
    out: Tensor = jbu(source, guide)
    return out


def unfolded(jbu: JBU, source: Tensor, guide: Tensor) -> Tensor:
    """The form that copies every neighbourhood."""
    group = GROUP if source.shape[1] > 3 * GROUP else source.shape[1]
    for (fh, fw), level in zip(jbu.steps, jbu.levels, strict=True):
        size = (fh * source.shape[2], fw * source.shape[3])
        kernels = published_kernels(level, area_resize(guide, size))
        parts = [published_filter(part, kernels, level.radius) for part in source.split(group, 1)]
        source = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return source


FORMS: dict[str, Form] = {"ours": ours, "unfolded": unfolded}


def task(form: Form, depth: int, backward: bool, side: int = SIDE) -> Callable[[], None]:
    """One forward pass, or with `backward` both for the map and all parameters."""
    torch.manual_seed(0)
    jbu, guide = JBU((4, 4)), torch.randn(1, 3, PIXELS, PIXELS)
    source = torch.randn(1, depth, side, side, requires_grad=backward)
    back = torch.randn(1, depth, 4 * side, 4 * side)
    if form is ours:
        back = back.to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = form(jbu, source, guide)
        if backward:
            out.backward(back)

    return run


def agree() -> None:
    """Checks that both forms give the same map."""
    jbu, source, guide = JBU((4, 4)), torch.randn(1, 16, SIDE, SIDE), torch.randn(1, 3, 384, 384)
    torch.testing.assert_close(ours(jbu, source, guide), unfolded(jbu, source, guide))


def speedup(depth: int, backward: bool, rounds: int) -> float:
    """CPU time of the unfolded form over ours."""
    tasks = {name: task(form, depth, backward) for name, form in FORMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    tasks["ours"]()
    for _ in range(rounds):
        for name, run in tasks.items():
            for _ in range(OURS_A_ROUND if name == "ours" else 1):
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    what = "forward + backward" if backward else "forward"
    for name, each in seconds.items():
        print(
            f"{what}, {depth} channels, {name}: {1e3 * statistics.median(each):.1f} CPU ms "
            f"[{1e3 * min(each):.1f}..{1e3 * max(each):.1f}]"
        )
    return statistics.median(seconds["unfolded"]) / statistics.median(seconds["ours"])


def resident(key: str) -> float:
    """MB of memory that this process has now (VmRSS) or has had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024 / 1e6


def added_memory(name: str) -> float:
    """Peak MB that one forward pass adds to this process, after a small one as a warm-up."""
    warm_up, run = (task(FORMS[name], 384, False, side) for side in (2, SIDE))
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def peak_memory(name: str) -> float:
    """`added_memory` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_jbu", "--peak", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = float(done.stdout.split()[-1])
    print(f"forward, 384 channels, {name}: {peak:.0f} MB at most")
    return peak


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=list(FORMS), help="print only its peak memory")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.peak:
        print(added_memory(chosen.peak))
        return []
    agree()
    forward, wide = (speedup(depth, False, chosen.rounds) for depth in (384, 1152))
    both = speedup(384, True, chosen.rounds)
    memory = peak_memory("unfolded") / peak_memory("ours")
    return [
        Figure("JBU 4x: forward, 384 channels, times faster than unfolded", forward, 60, False),
        Figure("JBU 4x: forward, 1152 channels, times faster than unfolded", wide, 70, False),
        Figure("JBU 4x: forward + backward, times faster than unfolded", both, 30, False),
        Figure("JBU 4x: forward, 384 channels, times less memory", memory, 25, False),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
