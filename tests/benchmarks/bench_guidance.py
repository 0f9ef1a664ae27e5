"""CPU time of our JAFAR and AnyUp, compared with the published form, forward pass.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_guidance

A 27 x 27 map is upsampled to 108 x 108 with an image of 384 px. The published form reads the image
at full size, pads its 1 x 1 convolutions, computes a sine for each pixel, and holds the whole
attention matrix. Both have the same weights and take turns in one process; the ratio of process CPU
time is the median over rounds. First the script checks that both give the same result if the
published form reads the image at our size.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.features import FeatureSpec
from teachers.upsamplers.anyup import AnyUp
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.guidance_encoder import (
    DIM,
    GuidanceEncoder,
    RotaryCoordinates,
    group_norm,
    read_size,
)
from teachers.upsamplers.jafar import JAFAR, mean_attention
from teachers.upsamplers.window import windows
from tests.benchmarks.figure import Figure

SIDE, PX, FACTOR, HEADS = 27, 384, 4, 4
LOW, HIGH = (SIDE, SIDE), (SIDE * FACTOR, SIDE * FACTOR)


def padded(upsampler: JAFAR | AnyUp) -> JAFAR | AnyUp:
    """A copy whose 1 x 1 convolutions pad by zero pixels, which copies their input."""
    public = copy.deepcopy(upsampler)
    for module in public.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.padding_mode = "reflect"
    return public


def rotated(rotary: RotaryCoordinates, maps: Tensor) -> Tensor:
    """Rotates halves of the channels by the angles of every pixel."""
    places = [(torch.arange(size) + 0.5) / size for size in maps.shape[-2:]]
    coordinates = torch.stack(torch.meshgrid(*places, indexing="ij"), -1)
    angles = (coordinates @ rotary.frequencies).repeat(1, 1, 2).permute(2, 0, 1)
    first, second = maps.chunk(2, dim=1)
    return maps * angles.cos() + torch.cat([-second, first], 1) * angles.sin()


def encoded(guide: GuidanceEncoder, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Queries and keys, from the image at `size`."""
    maps = rotated(guide.rotary, guide.trunk(guidance(images, size)))
    queries = F.adaptive_avg_pool2d(guide.query(maps), HIGH)
    keys = F.adaptive_avg_pool2d(guide.key(maps), LOW)
    return guide.query_conv(group_norm(queries)), group_norm(keys)


def tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def public_jafar(
    jafar: JAFAR, features: Tensor, images: Tensor, size: tuple[int, int] = (PX, PX)
) -> Tensor:
    queries, keys = encoded(jafar.guide, images, size)
    semantic = jafar.semantic(F.normalize(features, dim=1))
    keys = jafar.gamma(semantic) * keys + jafar.beta(semantic)
    q, k = jafar.query(tokens(queries)), jafar.key(tokens(keys))
    return mean_attention(q, k, tokens(features), HEADS).transpose(1, 2).unflatten(2, HIGH)


def public_anyup(
    anyup: AnyUp, features: Tensor, images: Tensor, size: tuple[int, int] = (PX, PX)
) -> Tensor:
    queries, keys = encoded(anyup.guide, images, size)
    channels = F.pad(F.normalize(features, dim=1), (2, 2, 2, 2), mode="replicate").transpose(0, 1)
    bank = anyup.signature.bank.weight.view(DIM, 1, 5, 5)
    signature = F.conv2d(channels, bank).softmax(1).mean(0, keepdim=True)
    keys = anyup.fuse(torch.cat([keys, signature], dim=1))
    q, k = anyup.query(tokens(queries)), anyup.key(tokens(keys))
    q, k = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k))
    logits = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + window_mask(anyup.radius)
    weights = logits.softmax(-1).mean(1)
    return (weights @ tokens(features)).transpose(1, 2).unflatten(2, HIGH)


def window_mask(radius: int) -> Tensor:
    """(N, n): zero within the window of a cell, minus infinity elsewhere."""
    first, inside = windows(SIDE, radius)
    seen = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    seen.scatter_(1, first[:, None] + torch.arange(inside.shape[1]), inside)
    seen = seen.repeat_interleave(FACTOR, dim=0)
    both = (seen[:, None, :, None] & seen[None, :, None, :]).reshape(HIGH[0] * HIGH[1], -1)
    return torch.zeros(both.shape).masked_fill_(~both, float("-inf"))


@torch.no_grad()
def compare(
    ours: Callable[[], Tensor], public: Callable[[], Tensor], name: str, rounds: int
) -> float:
    """CPU time of the published form over ours; the first round only warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "public": []}
    for number in range(rounds + 1):
        for kind, run in (("public", public), ("ours", ours)):
            start = time.process_time()
            run()
            if number:
                seconds[kind].append(time.process_time() - start)
    for kind, each in seconds.items():
        middle = statistics.median(each)
        print(f"{name} {kind}: {middle:.3f} CPU s [{min(each):.3f}..{max(each):.3f}]", flush=True)
    pairs = zip(seconds["public"], seconds["ours"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=384, help="channels of the features")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, features = torch.rand(1, 3, PX, PX), torch.randn(1, chosen.dim, *LOW)
    spec = FeatureSpec(summary_dim=None, spatial_dim=chosen.dim, patch_size=14, resolution=(PX, PX))
    figures = []
    for kind, public in ((JAFAR, public_jafar), (AnyUp, public_anyup)):
        ours = kind(spec, (FACTOR, FACTOR))
        theirs = padded(ours)
        with torch.no_grad():
            same = public(theirs, features, images, read_size((PX, PX), HIGH))
            torch.testing.assert_close(same, ours.dense(features, images), rtol=1e-3, atol=1e-4)
        ratio = compare(
            lambda ours=ours: ours.dense(features, images),
            lambda theirs=theirs, public=public: public(theirs, features, images),
            kind.__name__,
            chosen.rounds,
        )
        figures.append(Figure(f"{kind.__name__}: times faster than as published", ratio, 3, False))
    return figures


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
