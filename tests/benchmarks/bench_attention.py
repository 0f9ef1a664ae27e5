"""CPU time of local attention, compared with flex_attention and with unfolded windows.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_attention

Windows of 7 x 7 cells with ALiBi on 108 x 108 cells, 16 heads of 48 channels. `flex` is compiled
flex_attention over tokens in raster order, as the public FeatSharp code calls it (it needs a C++
compiler and has no backward pass on a CPU); `unfold` copies the keys and values of every cell's
window. All three take turns in one process on one thread; the ratios of process CPU time are
medians over rounds. First the script checks that all give the same numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from teachers.upsamplers.local_attention import alibi_slopes, local_attention
from tests.benchmarks.figure import Figure

SIDE, HEADS, DIM, WINDOW = 108, 16, 48, 7
SLOPES = alibi_slopes(HEADS)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours; all inputs are (1, h, w, heads, d), here and below."""
    return local_attention(q, k, v, window=WINDOW, slopes=SLOPES)


def unfold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Copies the keys and values of every window, by im2col."""
    radius = WINDOW // 2

    def windows(x: Tensor) -> Tensor:
        columns = F.unfold(x.flatten(3).permute(0, 3, 1, 2), WINDOW, padding=radius)
        return columns.view(HEADS, DIM, WINDOW * WINDOW, SIDE * SIDE)

    offsets = torch.arange(-radius, radius + 1).abs()
    rows, columns = torch.cartesian_prod(offsets, offsets).unbind(1)
    odd = torch.arange(HEADS)[:, None] % 2
    bias = -SLOPES[:, None] * torch.where(odd == 1, columns, rows)
    inside = F.unfold(torch.ones(1, 1, SIDE, SIDE), WINDOW, padding=radius)[0] > 0
    queries = q[0].permute(2, 3, 0, 1).reshape(HEADS, DIM, 1, SIDE * SIDE)
    logits = (queries * windows(k)).sum(1) * DIM**-0.5 + bias[..., None]
    weights = logits.masked_fill(~inside, -torch.inf).softmax(1)
    mixed = (weights[:, None] * windows(v)).sum(2)
    return mixed.view(HEADS, DIM, SIDE, SIDE).permute(2, 3, 0, 1)[None]


def raster_flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled flex_attention; its mask is made once and not timed."""

    def near(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = (query // SIDE - key // SIDE).abs()
        columns = (query % SIDE - key % SIDE).abs()
        return (rows <= WINDOW // 2) & (columns <= WINDOW // 2)

    def penalised(logit: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = (query // SIDE - key // SIDE).abs()
        columns = (query % SIDE - key % SIDE).abs()
        return logit - SLOPES[head] * torch.where(head % 2 == 1, columns, rows)

    tokens = SIDE * SIDE
    mask = create_block_mask(near, None, None, tokens, tokens, device="cpu")
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v))
        mixed = compiled(q, k, v, score_mod=penalised, block_mask=mask)
        return mixed.transpose(1, 2).unflatten(1, (SIDE, SIDE))

    return attend


def both_ways(inputs: list[Tensor], gradient: Tensor) -> None:
    """Forward and backward pass of ours."""
    leaves = [x.requires_grad_() for x in inputs]
    torch.autograd.grad(ours(*leaves), leaves, gradient)
    for x in inputs:
        x.requires_grad_(False)


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = [torch.randn(1, SIDE, SIDE, HEADS, DIM) for _ in range(3)]
    gradient = torch.randn_like(inputs[0])
    flex = raster_flex()
    with torch.no_grad():
        due = ours(*inputs)  # and a warm-up of each
        torch.testing.assert_close(unfold(*inputs), due, atol=1e-4, rtol=0)
        torch.testing.assert_close(flex(*inputs), due, atol=1e-4, rtol=0)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(*inputs),
        "flex": lambda: flex(*inputs),
        "unfold": lambda: unfold(*inputs),
        "ours, forward and backward": lambda: both_ways(inputs, gradient),
    }
    runs["ours, forward and backward"]()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in sorted(runs.items(), reverse=bool(number % 2)):
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    for name, each in seconds.items():
        print(
            f"{name}: {1e3 * statistics.median(each):.0f} CPU ms "
            f"[{1e3 * min(each):.0f}..{1e3 * max(each):.0f}]"
        )

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True))

    return [
        Figure("local attention: flex_attention's CPU time over ours", ratio("flex"), 7, False),
        Figure("local attention: the unfold form's CPU time over ours", ratio("unfold"), 25, False),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
