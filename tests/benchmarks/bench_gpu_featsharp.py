"""Time of FeatSharp on a GPU, compared with the passes of its encoder.

    python -m tests.benchmarks.bench_gpu_featsharp

DFN CLIP ViT-H/14-378 and SigLIP SO400M with random weights, 378 px, bf16, encoder and fusion
compiled, TF32 for float32 products, as in a recipe with `targets: {precision: bf16, compile: true}`
and a bf16 engine. The teacher with its standardised upsampler takes turns with the encoder alone on
a batch of as many images as it encodes; medians of CUDA events. Measures nothing without a GPU.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from teachers.build import build_teacher, parse_teacher
from teachers.compiled import compile_teacher
from teachers.phi_s import any_phi_s
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.standardised import Standardised
from tests.benchmarks.figure import Figure

ENCODERS = {
    "ViT-H/14-378": {"kind": "dfn_clip", "model": "ViT-H-14-378-quickgelu"},
    "SO400M/14-378": {
        "kind": "siglip",
        "model": "ViT-SO400M-14-SigLIP-384",
        "resolution": [378, 378],
    },
}
FACTORS = (2, 3, 4)
IMAGES = {2: 16, 3: 8, 4: 4}  # of one call: 80, 80 and 68 encoder passes
MOST = 1.20  # times the passes, at 4x


def milliseconds(call: Callable[[], object]) -> float:
    """The time of a call on the GPU."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def upsampled(teacher: Teacher, factor: int) -> UpsampledTeacher:
    """A teacher with an upsampler of random weights, in the form of a trained one."""
    config = parse_upsampler({"kind": "featsharp", "inputs": ["jbu", "tiles"], "factor": factor})
    assert config is not None
    phi_s = any_phi_s(teacher.spec.spatial_dim)
    upsampler = Standardised(build_upsampler(config, teacher.spec), phi_s).cuda()
    return UpsampledTeacher(teacher, upsampler).cuda().cast(torch.bfloat16).freeze()


def measure(name: str, factor: int, teacher: Teacher, whole: Teacher, rounds: int) -> float:
    """The median ratio of the upsampled teacher's time to that of its encoder passes."""
    count, passes = IMAGES[factor], 1 + factor**2
    height, width = teacher.spec.resolution
    images = torch.rand(count, 3, factor * height, factor * width, device="cuda")
    batch = torch.rand(count * passes, 3, height, width, device="cuda")
    times: list[tuple[float, float]] = []
    for number in range(rounds + 3):
        pair = milliseconds(lambda: whole(images)), milliseconds(lambda: teacher(batch))
        if number >= 3:  # by then it is compiled
            times.append(pair)
    ratio = statistics.median(a / b for a, b in times)
    rate, bare = (1000 * count / statistics.median(each) for each in zip(*times, strict=True))
    print(
        f"{name}, {factor}x: {rate:.1f} images/s, its {passes} passes {bare:.1f} images/s; "
        f"{ratio:.3f} times their time",
        flush=True,
    )
    return ratio


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return []
    print(torch.cuda.get_device_name())
    torch.set_float32_matmul_precision("high")
    figures = []
    for name, entry in ENCODERS.items():
        with torch.device("cuda"):
            teacher = build_teacher(
                parse_teacher(entry | {"weights": "none"}), device="cuda", dtype=torch.bfloat16
            )
        compile_teacher(teacher)
        for factor in FACTORS:
            whole = upsampled(teacher, factor)
            whole.upsampler.get_submodule("inner.fusion").compile()
            ratio = measure(name, factor, teacher, whole, chosen.rounds)
        figures.append(Figure(f"FeatSharp 4x on a GPU, {name}: over its passes", ratio, MOST, True))
    return figures


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
