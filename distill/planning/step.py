"""What a step of a recipe is made of, found by running its own code on fake tensors."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from distill.planning.meter import Meter, Part
from distill.runtime.errors import RecipeError
from distill.targets.routes import RouteChoice
from distill.training.training_recipe import TrainingRecipe
from teachers.build import build_teacher
from teachers.errors import TeacherError
from teachers.teacher import Teacher, TeacherConfig


class Arm(NamedTuple):
    """Images of one size that go through some teachers and the student.

    Attributes:
        key: its name in the recipe; empty where that has no arms.
        name: in tables.
        resolution: (height, width) in pixels of its images.
        batch_size: its images in one optimiser step, over all ranks that run it.
        micro_batch: images of one forward pass on one rank, at most.
        routes: teacher to route, for those that see the images.
        share: of the steps that have this size, over the run.
        ranks: its share of the ranks, against other arms'; None where all ranks run it.
    """

    key: str
    name: str
    resolution: tuple[int, int]
    batch_size: int
    micro_batch: int
    routes: Mapping[str, RouteChoice]
    share: float = 1.0
    ranks: int | None = None


class Row(NamedTuple):
    """A model in the table of an arm.

    Attributes:
        part: of the trace, `clip` or `clip/upsampler`.
        parameters: how many.
        bytes: of its weights, as they lie on every rank.
        seen: what it is given and returns, `378x378 px -> 27x27x1280`.
        passes: images that it sees for each of the arm's.
        trained: whether the engine holds it.
    """

    part: str
    parameters: int
    bytes: int
    seen: str
    passes: float = 1
    trained: bool = True


@dataclass(frozen=True)
class Trace:
    """One micro-batch of an arm, forward and backward.

    Attributes:
        images: in the micro-batch.
        parts: of the step, by name.
        peak: bytes beyond weights, at most, without gradients.
        peak_with_gradients: bytes beyond weights, at most, where gradients stay.
    """

    images: int
    parts: dict[str, Part]
    peak: int
    peak_with_gradients: int

    def flops(self, *parts: str) -> Counter[torch.dtype]:
        """FLOPs of an image, by precision; of all parts where none is named."""
        total: Counter[torch.dtype] = Counter()
        for name in parts or self.parts:
            total.update(self.parts[name].flops)
        return Counter({dtype: flops // self.images for dtype, flops in total.items()})


class Workload(ABC):
    """The models of a recipe, without weights.

    Attributes:
        recipe: whose.
        trained: what the engine holds.
        arms: of one optimiser step.
        teachers: by name.
    """

    recipe: TrainingRecipe
    trained: nn.Module
    arms: list[Arm]
    teachers: dict[str, Teacher]
    whole_average: bool = False

    @property
    @abstractmethod
    def statistics_images(self) -> int:
        """Images that the teachers see before the first step, over all ranks."""

    @abstractmethod
    def rows(self, arm: Arm) -> list[Row]:
        """What the arm's images go through."""

    @abstractmethod
    def trace(self, arm: Arm, images: int) -> Trace:
        """Runs one micro-batch of `images`.

        Raises:
            RecipeError: a teacher refuses images of this size.
        """


def imagined_teacher(config: TeacherConfig, precision: str, where: str) -> Teacher:
    """A teacher on the meta device.

    Raises:
        RecipeError: it cannot be built; names its entry.
    """
    dtype = torch.bfloat16 if precision == "bf16" else None
    try:
        return build_teacher(config, device="meta", dtype=dtype)
    except TeacherError as error:
        hint = ""
        if "no such file" in str(error) and str(error).startswith("upsampler"):
            hint = (
                "; to plan before it is trained, describe it, such as "
                f"{where}.upsampler={{kind: featsharp, factor: 3}}"
            )
        raise RecipeError(f"{where}: {error}{hint}") from error


@contextmanager
def explained(arm: Arm) -> Iterator[None]:
    """A teacher's refusal of an arm's images as a mistake in the recipe."""
    try:
        yield
    except TeacherError as error:
        h, w = arm.resolution
        raise RecipeError(f"{arm.name}, {h} x {w} px: {error}") from error


def seen(size: tuple[int, int], grid: tuple[int, int], dim: int) -> str:
    """What an encoder is given and returns, in words."""
    return f"{size[0]}x{size[1]} px -> {grid[0]}x{grid[1]}x{dim}"


def traced(meter: Meter, images: int) -> Trace:
    """What a meter has seen of a micro-batch."""
    parts = {name: part for name, part in meter.parts.items() if name}
    return Trace(images, parts, meter.peak, meter.peak_with_gradients)


def count(module: nn.Module) -> tuple[int, int]:
    """Parameters, and bytes of them and of the buffers."""
    parameters = list(module.parameters())
    tensors = [*parameters, *module.buffers()]
    return (
        sum(p.numel() for p in parameters),
        sum(t.numel() * t.element_size() for t in tensors),
    )
