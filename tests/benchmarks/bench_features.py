"""CPU time of extracting features from files, compared with the bare model on images in memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_features

A timm ViT-B/16 of 224 px with random weights, JPEGs of 500 x 375, batches of 16. Both take turns in
one process; the ratio of process CPU time, which other processes disturb less than wall time, is
the median over rounds. Decoding counts in full here, though it runs in threads beside the model.
Target: at least 0.95 times the images/s of the bare model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from data.labelled.prepared import ImagePreparation, PreparationConfig, read_prepared
from distill.benchmarks.classification.summaries import Encoding, SummaryConfig
from teachers.build import build_teacher, parse_teacher
from tests.benchmarks.bench_stream import make_photographs
from tests.benchmarks.figure import Figure

MODEL, SIDE, BATCH = "vit_base_patch16_224", 224, 16


def extraction(photographs: dict[str, bytes]) -> Callable[[], Tensor]:
    """Encodes a set as `knn` does; each round has another name, so that no cache serves it."""
    encoder = build_teacher(
        parse_teacher({"kind": "timm", "model": MODEL, "weights": "none"}), device="cpu"
    )
    encode = Encoding(encoder, SummaryConfig(kind="knn", batch_size=BATCH))
    rounds = iter(range(1_000_000))
    return lambda: encode(list(photographs), photographs.__getitem__, f"{next(rounds)}").own


def bare_model(photographs: dict[str, bytes]) -> Callable[[], Tensor]:
    """timm's model alone, on prepared batches."""
    import timm  # after the package `teachers`, which repairs torchvision

    model = timm.create_model(MODEL, num_classes=0, global_pool="token").eval()
    prepare = ImagePreparation(PreparationConfig(), (SIDE, SIDE), 16)
    pixels = read_prepared(list(photographs), photographs.__getitem__, prepare)
    images = torch.stack([torch.tensor(each).permute(2, 0, 1) / 127.5 - 1 for each in pixels])

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([model(batch) for batch in images.split(BATCH)])

    return run


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    photographs = {f"{i}.jpg": data for i, data in enumerate(make_photographs(options.images))}
    variants = {"files": extraction(photographs), "bare": bare_model(photographs)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds + 1):  # the first only warms up
        for name, run in sorted(variants.items(), reverse=bool(number % 2)):
            start = time.process_time()
            assert run().shape == (options.images, 768)
            if number:
                seconds[name].append((time.process_time() - start) / options.images)
    for name, each in seconds.items():
        print(f"{name}: {1000 * statistics.median(each):.1f} CPU ms an image")
    ratios = [b / f for f, b in zip(seconds["files"], seconds["bare"], strict=True)]
    value = statistics.median(ratios)
    return [Figure("feature extraction: images/s over the bare model", value, 0.95, False)]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
