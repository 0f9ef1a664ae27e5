"""How far an ONNX graph under onnxruntime is from the student in PyTorch, output by output."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.formats.onnx_graph import IMAGES
from distill.formats.onnx_precision import LEVELS, Precision

SIZES = ((6, 6), (4, 9), (14, 14))  # of the images that are compared, in patches
_COUNT = 3  # images of a size
_OCTAVES = 8  # of details, from half of an image to two pixels of a large one
_PATCHES_OF_COLOUR = 6


class Difference(NamedTuple):
    """The difference of an output from PyTorch, the largest of all sizes.

    Attributes:
        absolute: largest absolute difference of a value.
        relative: norm of the difference over the norm of the output.
        cosine: of vectors along the channels, mean over images and cells; the lowest of all sizes.
    """

    absolute: float
    relative: float
    cosine: float


class Bound(NamedTuple):
    """The figure of a `Difference` that a precision is judged by, and what it may be."""

    figure: str
    limit: float

    @property
    def text(self) -> str:
        """The bound in words."""
        if self.figure == "cosine":
            return f"cosine at least {self.limit:g}"
        return f"{self.figure} difference at most {self.limit:g}"

    def holds(self, difference: Difference) -> bool:
        """Whether a difference keeps to it; one that is not a number does not."""
        if self.figure == "cosine":
            return difference.cosine >= self.limit
        return bool(getattr(difference, self.figure) <= self.limit)


# float32: rounding grows with depth and with the size of the values. A small student differs by
# 3e-6 at most, absolute.
BOUNDS: dict[Precision, Bound] = {
    "fp32": Bound("relative", 1e-5),
    "fp16": Bound("relative", 2e-3),
    "int8": Bound("cosine", 0.999),
}


class Agreement(NamedTuple):
    """How a written graph agrees with PyTorch.

    Attributes:
        precision: of the graph.
        opset: of the graph.
        level: of `LEVELS`, for int8.
        outputs: the difference of each output.
        patch_size: of the student, in pixels.
    """

    precision: Precision
    opset: int
    level: int
    outputs: dict[str, Difference]
    patch_size: int

    @property
    def bound(self) -> Bound:
        """What every output keeps to."""
        return BOUNDS[self.precision]

    @property
    def integers(self) -> str:
        """What multiplies integers, in words; for int8."""
        return LEVELS[self.level]

    @property
    def sizes(self) -> list[str]:
        """The sizes that were compared, in pixels: `96 x 96`."""
        return [f"{h * self.patch_size} x {w * self.patch_size}" for h, w in SIZES]

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """For each output its name and figures, as text."""
        return [
            (name, f"{each.absolute:.1e}", f"{each.relative:.1e}", f"{each.cosine:.5f}")
            for name, each in self.outputs.items()
        ]


class Expected(NamedTuple):
    """Images of one size, and the outputs of the student for them."""

    images: Tensor
    outputs: dict[str, Tensor]


@torch.no_grad()
def expect(model: nn.Module, patch_size: int) -> list[Expected]:
    """Runs a student, see `onnx_graph.Outputs`, on images of all `SIZES`."""
    images = [likeness(_COUNT, h * patch_size, w * patch_size) for h, w in SIZES]
    return [Expected(each, model(each)) for each in images]


def likeness(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Draws images with the statistics of photographs: details of all sizes, edges, few colours.

    Noise without structure would tell little: its patches are all alike.

    Returns:
        (count, 3, height, width) in [0, 1], the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, height, width)
    for octave in range(1, _OCTAVES + 1):
        side = 2**octave
        grey = torch.randn(count, 1, side, side, generator=generator)
        colour = torch.randn(count, 3, side, side, generator=generator)
        detail = F.interpolate(grey + 0.6 * colour, (height, width), mode="bicubic")
        images += detail / 1.6**octave  # amplitude falls with frequency
    images = 0.45 + 0.25 * images / images.std((1, 2, 3), keepdim=True)
    for image in images:
        for _ in range(_PATCHES_OF_COLOUR):
            top, left = (
                int(torch.randint(side, (), generator=generator)) for side in (height, width)
            )
            tall, wide = (
                int(torch.randint(side // 8, side // 2, (), generator=generator)) + 1
                for side in (height, width)
            )
            colour = torch.rand(3, 1, 1, generator=generator)
            part = image[:, top : top + tall, left : left + wide]
            part.mul_(0.4).add_(0.6 * colour)
    return images.clamp(0, 1)


def compare(graph: Path, expected: Sequence[Expected]) -> dict[str, Difference]:
    """Runs a graph by onnxruntime on the CPU, and returns the difference of each output."""
    session = open_session(graph)
    names = list(expected[0].outputs)

    def run(images: Tensor) -> dict[str, Tensor]:
        came = session.run(names, {IMAGES: images.numpy()})
        return {name: torch.from_numpy(each) for name, each in zip(names, came, strict=True)}

    return measure(run, expected)


def measure(
    run: Callable[[Tensor], Mapping[str, Tensor]], expected: Sequence[Expected]
) -> dict[str, Difference]:
    """The difference of each output of anything that takes the images."""
    found: dict[str, Difference] = {}
    for images, outputs in expected:
        came = run(images)
        for name, value in outputs.items():
            now = _difference(value, came[name])
            found[name] = _worse(found[name], now) if name in found else now
    return found


def open_session(graph: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """An onnxruntime session that reports errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=list(providers))


def missed(found: Mapping[str, Difference], bound: Bound) -> str | None:
    """The output that misses a bound by most; None where all keep to it."""
    wrong = [name for name, each in found.items() if not bound.holds(each)]
    return max(wrong, key=lambda name: found[name].relative) if wrong else None


def _difference(value: Tensor, other: Tensor) -> Difference:
    off, size = (other - value).double(), value.double()
    norm, rest = float(size.norm()), float(off.norm())
    # Along the channels; an output that is zero in both agrees.
    cosines = F.cosine_similarity(size, other.double(), dim=1)
    same = (size.norm(dim=1) == 0) & (off.norm(dim=1) == 0)
    return Difference(
        float(off.abs().max()),
        rest / norm if norm else rest,
        float(cosines.masked_fill(same, 1).mean()),
    )


def _worse(one: Difference, other: Difference) -> Difference:
    for each in (one, other):
        if math.isnan(each.relative):  # which `max` would pass over
            return each
    return Difference(
        max(one.absolute, other.absolute),
        max(one.relative, other.relative),
        min(one.cosine, other.cosine),
    )


def agreement_text(agreement: Agreement) -> str:
    """Lines for a terminal: the figures of each output, and the bound that all keep to."""
    lines = [f"onnxruntime and PyTorch, {agreement.precision}: {agreement.bound.text}"]
    for name, absolute, relative, cosine in agreement.rows:
        lines.append(f"  {name}: at most {absolute} off, relative {relative}, cosine {cosine}")
    if agreement.precision == "int8":
        lines.append(f"  what multiplies integers: {agreement.integers}")
    return "\n".join(lines)
