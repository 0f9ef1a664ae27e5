"""The optimizer step of a recipe: its models, and a trace of them on fake tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from distill.planning.meter import FakeWeights, Meter, Trace
from distill.runtime.errors import RecipeError
from distill.targets.routes import RouteChoice
from distill.training.training_recipe import TrainingRecipe
from teachers.build import build_teacher
from teachers.errors import TeacherError
from teachers.teacher import Teacher, TeacherConfig


class Arm(NamedTuple):
    """Images of one size that go through some teachers and the student.

    Attributes:
        key: the arm's name in the recipe; empty if the recipe has no arms.
        name: in tables.
        resolution: (height, width) of its images in pixels.
        batch_size: images of one optimizer step, over all ranks that run the arm.
        micro_batch: the most images of one forward pass on one rank.
        routes: teacher to route, for the teachers that see the images.
        share: share of the run's steps that have this size.
        ranks: its share of the ranks, relative to other arms'; None if all ranks run it.
    """

    key: str
    name: str
    resolution: tuple[int, int]
    batch_size: int
    micro_batch: int
    routes: Mapping[str, RouteChoice]
    share: float = 1.0
    ranks: int | None = None


class ModelRow(NamedTuple):
    """A model in the table of an arm.

    Attributes:
        component: its name in the trace, such as `clip` or `clip/upsampler`.
        model: the model; empty for losses.
        shapes: of its input and output, such as `378x378 px -> 27x27x1280`.
        passes: images that it sees for each image of the arm.
        trained: whether the engine trains it.
    """

    component: str
    model: nn.Module
    shapes: str = ""
    passes: float = 1
    trained: bool = True

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())


class Workload(ABC):
    """The models of a recipe, without weights.

    Attributes:
        recipe: that of the run.
        trained: the module that the engine trains.
        arms: those of one optimizer step.
        teachers: by name.
        whole_average: whether every rank keeps the whole average of the weights.
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
    def rows(self, arm: Arm) -> list[ModelRow]:
        """The models that the arm's images go through."""

    @abstractmethod
    def trace(self, arm: Arm, images: int) -> Trace:
        """Runs one micro-batch of `images`.

        Raises:
            RecipeError: a teacher cannot take images of this size.
        """

    def _modules(self) -> list[nn.Module]:
        """All modules of a step."""
        return [self.trained, *self.teachers.values()]

    def _fake_weights(self) -> FakeWeights:
        """Gives all modules fake weights; returns the maker of fake tensors that go with them."""
        fake = FakeWeights()
        for module in self._modules():
            fake.fill(module)
        return fake

    @contextmanager
    def _metered(self, arm: Arm) -> Iterator[Meter]:
        """Meters the block, then frees the gradients; a TeacherError becomes a RecipeError."""
        with Meter(*self._modules()) as meter:
            try:
                yield meter
            except TeacherError as error:
                h, w = arm.resolution
                raise RecipeError(f"{arm.name}, {h} x {w} px: {error}") from error
        self.trained.zero_grad()


def meta_teacher(config: TeacherConfig, precision: str, where: str) -> Teacher:
    """A teacher on the meta device, in the precision of `targets`.

    Raises:
        RecipeError: it cannot be built; the message names its key in the recipe (`where`).
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


def encoder_shapes(size: tuple[int, int], grid: tuple[int, int], dim: int) -> str:
    """The shapes of an encoder's input and map, for tables."""
    return f"{size[0]}x{size[1]} px -> {grid[0]}x{grid[1]}x{dim}"


def num_bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
