"""Trains several upsamplers of one teacher on the same images and views, for a fair comparison.

    python -m tests.quality.train_together RECIPE [key=value ...]

The recipe is one of `train_upsampler` with an additional `methods: {name: upsampler}`. The encoder,
which is nearly all of the cost, encodes each image once in a step, whatever the number of methods.
Each method has its own downsampler, bias, uncertainty and gradient; only the images are shared. A
checkpoint contains `NAME.safetensors` for each method.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.optimizer import ParameterGroup
from distill.objective.objective import LossTerms
from distill.parametrization.reparametrize import plain_weights
from distill.runtime import distributed
from distill.runtime.command import command
from distill.runtime.config import load_recipe
from distill.tasks.upsampler_recipe import AnyUpsampler, UpsamplerRecipe
from distill.tasks.upsampler_run import NAME, base_resolution, build_encoder, fit_phi_s_of
from distill.tasks.upsampler_task import (
    MultiView,
    build_multi_view,
    draw_views,
    exported_tensors,
    parameter_groups,
    upsampler_card,
)
from distill.training.arms import MicroBatch
from distill.training.session import Assembly, run_command
from teachers.features import Features
from teachers.teacher import Teacher
from teachers.upsamplers.consistency import ConsistencyTerms
from teachers.upsamplers.trained import save_upsampler


class ComparisonRecipe(UpsamplerRecipe):
    """An upsampler's recipe with several upsamplers."""

    methods: dict[str, AnyUpsampler] = Field(min_length=1)

    def of(self, name: str) -> UpsamplerRecipe:
        """The recipe of one method."""
        return self.model_copy(update={"upsampler": self.methods[name]})


class CachingEncoder(nn.Module):
    """An encoder that caches the features of each image in `known`."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher, self.spec = teacher, teacher.spec
        self.known: dict[bytes, tuple[Tensor | None, Tensor]] = {}

    def forward(self, images: Tensor) -> Features:
        keys = [image.numpy().tobytes() for image in images]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        if new:
            summary, spatial = self.teacher(images[new])
            for row, i in enumerate(new):
                one = None if summary is None else summary[row]
                self.known[keys[i]] = (one, spatial[row])
        found = [self.known[key] for key in keys]
        summaries = [one for one, _ in found if one is not None]
        return Features(
            torch.stack(summaries) if summaries else None, torch.stack([m for _, m in found])
        )


class Together(nn.Module):
    """Several methods as one module."""

    def __init__(self, members: Mapping[str, MultiView], encoder: CachingEncoder) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)
        self._encoder = (encoder,)

    def forward(self, images: Tensor, homographies: Tensor) -> dict[str, ConsistencyTerms]:
        self._encoder[0].known.clear()
        return {name: member(images, homographies) for name, member in self.members.items()}


class TogetherTask:
    """Trains the methods with one engine."""

    def __init__(
        self, recipe: ComparisonRecipe, engine: DeepSpeedEngine, teacher: Teacher, fingerprint: str
    ) -> None:
        self.engine, self._recipe, self._teacher = engine, recipe, teacher
        self._fingerprint = fingerprint

    def loss(self, images: Tensor, micro_batch: MicroBatch) -> LossTerms:
        factor = _factor(self._recipe)
        views = draw_views(self._recipe.views, len(images), self._teacher.spec, factor)
        terms: dict[str, ConsistencyTerms] = self.engine(images, views)
        total = torch.stack([each.total for each in terms.values()]).sum()
        losses = {name: each.parts["reconstruction"] for name, each in terms.items()}
        return LossTerms(total, losses, {f"mse/{n}": t.mse for n, t in terms.items()}).scaled(
            micro_batch.share
        )

    def save(self, folder: Path) -> None:
        weights = plain_weights(self.engine.weights())
        for name in self._recipe.methods if distributed.rank() == 0 else ():
            card = upsampler_card(self._recipe.of(name), self._teacher.spec, self._fingerprint)
            tensors = exported_tensors(weights, f"members.{name}.")
            save_upsampler(folder / f"{name}.safetensors", tensors, card)

    def load(self, folder: Path) -> None:
        """Does nothing: the engine has all state."""

    def draw(self, images: Tensor, micro_batch: MicroBatch, path: Path) -> None:
        raise NotImplementedError("tracking.pictures_every must be 0")


def _factor(recipe: ComparisonRecipe) -> tuple[int, int]:
    factors = {upsampler.factor for upsampler in recipe.methods.values()}  # type: ignore[attr-defined]
    (factor,) = factors
    return (int(factor[0]), int(factor[1]))


def assemble(recipe: ComparisonRecipe) -> Assembly:
    teacher, fingerprint = build_encoder(recipe)
    resolution = base_resolution(recipe, teacher.spec)
    plan = recipe.step_plan(resolution, NAME, distributed.world_size())
    stream = recipe.open_stream(plan)
    phi_s = fit_phi_s_of(recipe, teacher, plan)
    encoder = CachingEncoder(teacher)
    members, groups = {}, []
    # Copies of PHI-S: a shared buffer would be saved for the first member only.
    for name in recipe.methods:
        own = recipe.of(name)
        members[name] = build_multi_view(own, encoder, deepcopy(phi_s))  # type: ignore[arg-type]
        for group in parameter_groups(members[name], own):
            groups.append(ParameterGroup(f"{name}.{group.name}", *group[1:]))
    module = Together(members, encoder)
    micro_batch = plan.micro_batches(distributed.rank(), 0)[0].images
    engine = DeepSpeedEngine(
        module, recipe.engine, recipe.optimizer, groups, micro_batch_size=micro_batch
    )
    return Assembly(TogetherTask(recipe, engine, teacher, fingerprint), stream, plan)


@command
def main() -> None:
    run_command(
        "tests.quality.train_together",
        "Train several upsamplers of one teacher together.",
        lambda path, overrides: load_recipe(ComparisonRecipe, path, overrides),
        assemble,
    )


if __name__ == "__main__":
    main()
