"""An upsampler's step, on models without weights: views, both maps, their loss, backward."""

import torch

from distill.engine.engine import Autocast
from distill.planning.meter import Imitation, Meter
from distill.planning.step import (
    Arm,
    Row,
    Trace,
    Workload,
    count,
    explained,
    imagined_teacher,
    seen,
    traced,
)
from distill.targets.routes import RouteChoice
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.tasks.upsampler_run import base_resolution
from distill.tasks.upsampler_task import MultiView, build_multi_view, draw_views
from teachers.phi_s import any_phi_s
from teachers.upsamplers.resize import scaled


class UpsamplerWorkload(Workload):
    """The encoder of a recipe and what is trained for it, without weights.

    Args:
        recipe: the run's.

    Raises:
        RecipeError: the encoder or the upsampler cannot be built.
    """

    recipe: UpsamplerRecipe
    trained: MultiView

    def __init__(self, recipe: UpsamplerRecipe) -> None:
        self.recipe = recipe
        self.teacher = imagined_teacher(recipe.teacher, recipe.targets.precision, "teacher")
        spec = self.teacher.spec
        resolution = base_resolution(recipe, spec)
        phi_s = any_phi_s(spec.spatial_dim)
        with torch.device("meta"):
            self.trained = build_multi_view(recipe, self.teacher, phi_s)
        run = recipe.run
        micro_batch = run.micro_batch_size or run.batch_size
        routes: dict[str, RouteChoice] = {"teacher": "auto"}
        self.arms = [Arm("", "views", resolution, run.batch_size, micro_batch, routes)]
        self.teachers = {"teacher": self.teacher}
        self._imitation = Imitation()
        for module in (self.teacher, self.trained):
            self._imitation.of(module)
        self.trained.train()

    def rows(self, arm: Arm) -> list[Row]:
        """See `Workload.rows`."""
        spec, upsampler = self.teacher.spec, self.trained.upsampler
        native = spec.resolution
        grid, dim = spec.grid(*native), spec.spatial_dim
        passes = upsampler.num_forwards + self.recipe.views.num_views
        high = seen(arm.resolution, scaled(grid, upsampler.factor), dim)
        teacher = seen(native, grid, dim)
        return [
            Row("upsampler", *count(upsampler), high),
            Row("consistency", *count(self.trained.consistency), ""),
            Row("teacher", *count(self.teacher), teacher, passes, trained=False),
        ]

    def trace(self, arm: Arm, images: int) -> Trace:
        """See `Workload.trace`."""
        spec, factor = self.teacher.spec, self.trained.upsampler.factor
        views = draw_views(self.recipe.views, images, spec, factor)
        pixels = self._imitation.tensor(images, 3, *arm.resolution)
        module = Autocast(self.trained, self.recipe.engine.precision)
        with Meter(self.trained, self.teacher) as meter, explained(arm):
            meter.inside(self.teacher, "teacher")
            meter.inside(self.trained.consistency, "consistency")
            with meter.part("upsampler"):
                total = module(pixels, views).total
            meter.name("upsampler")
            total.backward()
        self.trained.zero_grad()
        return traced(meter, images)

    @property
    def statistics_images(self) -> int:
        """See `Workload.statistics_images`."""
        return self.recipe.targets.statistics_images
