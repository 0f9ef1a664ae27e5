"""GPUs by name, and the time of computation, collectives and reading on them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from distill.runtime.errors import RecipeError
from teachers.messages import did_you_mean

GB = 1e9
LINK_SHARE = 0.8  # of a link's rate, that collectives reach
MEMORY_SHARE = 0.92  # of a GPU's memory, that is available: contexts, libraries, fragments take 8 %

# Rates of reading JPEGs, measured on one core of a Xeon (500 x 375 px: 400 images/s, 75 Mpx/s;
# 3 Mpx: 138 Mpx/s); SOURCE_PIXELS is a JPEG's number of pixels over that of the student's input.
PIXELS_PER_S = 90e6
IMAGES_PER_S = 400.0
SOURCE_PIXELS = 2


class Gpu(NamedTuple):
    """One GPU, by its maker's data sheet.

    Attributes:
        half: TFLOP/s of dense bf16 products, accumulated in float32.
        tf32: TFLOP/s of TF32 products, for float32 tensors in runs in bf16 or fp16.
        single: TFLOP/s of float32 products, for runs in fp32.
        memory: GB (10^9 bytes).
        link: GB/s that it sends to other GPUs of its node.
        node: GPUs of a usual node.
        network: GB/s that it sends to other nodes.
        source: of the numbers.
    """

    half: float
    tf32: float
    single: float
    memory: float
    link: float
    node: int
    network: float
    source: str


# Links in one direction, half of what data sheets give. Networks: a NIC a GPU, of 400 Gb/s with
# H100, H200 and B200, of 200 Gb/s with A100 (NVIDIA's DGX systems); else 100 Gb/s a node.
GPUS = {
    "b200": Gpu(2250, 1125, 75, 180, 900, 8, 50, "NVIDIA DGX B200 data sheet"),
    "h200": Gpu(989, 494, 67, 141, 450, 8, 50, "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu(989, 494, 67, 80, 450, 8, 50, "NVIDIA H100 data sheet, SXM"),
    "a100": Gpu(312, 156, 19.5, 80, 300, 8, 25, "NVIDIA A100 data sheet, SXM 80 GB"),
    "l40s": Gpu(362, 183, 91.6, 48, 32, 8, 1.6, "NVIDIA L40S data sheet, PCIe 4"),
    "4090": Gpu(165, 82.6, 82.6, 24, 32, 4, 3.1, "NVIDIA Ada white paper, PCIe 4"),
    "3090": Gpu(71, 35.6, 35.6, 24, 32, 4, 3.1, "NVIDIA Ampere GA102 white paper, PCIe 4"),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        RecipeError: it is unknown.
    """
    if name.lower() not in GPUS:
        raise RecipeError(
            f"--gpu {name}: unknown{did_you_mean(name.lower(), GPUS)}; choose from "
            f"{', '.join(GPUS)}"
        )
    return GPUS[name.lower()]


class Speed(NamedTuple):
    """The speed of a GPU in a run.

    Attributes:
        gpu: the GPU.
        precision: of the engine; except in fp32, float32 products run in TF32.
        utilisation: achieved share of the GPU's rates, in (0, 1].
    """

    gpu: Gpu
    precision: str
    utilisation: float

    @property
    def single(self) -> float:
        """TFLOP/s of products of float32 tensors, at full utilisation."""
        return self.gpu.single if self.precision == "fp32" else self.gpu.tf32

    def seconds(self, flops: Mapping[torch.dtype, float]) -> float:
        """Seconds of FLOPs, given by precision, each at the rate of its precision."""
        rates = {torch.float32: self.single, torch.float64: self.gpu.single / 2}
        teras = sum(count / rates.get(dtype, self.gpu.half) for dtype, count in flops.items())
        return teras / 1e12 / self.utilisation


def link_seconds(sent: float, gpu: Gpu, ranks: int) -> float:
    """Seconds to send `sent` bytes over the slowest link of the ring around all ranks."""
    rate = gpu.link if ranks <= gpu.node else min(gpu.link, gpu.network)
    return sent / (rate * GB * LINK_SHARE)


def reading_seconds(images: float, resolution: tuple[int, int], workers: int) -> float:
    """Seconds that the workers of a rank take to decode, crop and resize images.

    Args:
        images: number of them.
        resolution: (height, width) of the student's input in pixels.
        workers: of a rank; 0 counts as 1.
    """
    pixels = SOURCE_PIXELS * resolution[0] * resolution[1]
    return images * max(pixels / PIXELS_PER_S, 1 / IMAGES_PER_S) / max(workers, 1)
