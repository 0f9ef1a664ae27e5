"""The step of an upsampler's training: views, both maps, their loss, the backward pass."""

import torch

from distill.engine.engine import Autocast
from distill.planning.meter import Trace
from distill.planning.step import Arm, ModelRow, Workload, encoder_shapes, meta_teacher
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.tasks.upsampler_run import base_resolution
from distill.tasks.upsampler_task import MultiView, build_multi_view, draw_views
from teachers.phi_s import any_phi_s
from teachers.upsamplers.resize import scaled


class UpsamplerWorkload(Workload):
    """The encoder of a recipe and the modules that are trained for it, without weights.

    Raises:
        RecipeError: the encoder or the upsampler cannot be built.
    """

    recipe: UpsamplerRecipe
    trained: MultiView

    def __init__(self, recipe: UpsamplerRecipe) -> None:
        self.recipe = recipe
        self.teacher = meta_teacher(recipe.teacher, recipe.targets.precision, "teacher")
        self.teachers = {"teacher": self.teacher}
        spec = self.teacher.spec
        resolution = base_resolution(recipe, spec)
        phi_s = any_phi_s(spec.spatial_dim)  # its values are read, so not on the meta device
        with torch.device("meta"):
            self.trained = build_multi_view(recipe, self.teacher, phi_s)
        batch, micro_batch = recipe.run.batch_size, recipe.run.micro_batch_size
        self.arms = [Arm("", "views", resolution, batch, micro_batch or batch, {"teacher": "auto"})]
        self._fake = self._fake_weights()
        self.trained.train()

    def rows(self, arm: Arm) -> list[ModelRow]:
        """See `Workload.rows`."""
        spec, upsampler = self.teacher.spec, self.trained.upsampler
        grid, dim = spec.grid(*spec.resolution), spec.spatial_dim
        passes = upsampler.num_forwards + self.recipe.views.num_views
        high = encoder_shapes(arm.resolution, scaled(grid, upsampler.factor), dim)
        low = encoder_shapes(spec.resolution, grid, dim)
        return [
            ModelRow("upsampler", upsampler, high),
            ModelRow("consistency", self.trained.consistency),
            ModelRow("teacher", self.teacher, low, passes, trained=False),
        ]

    def trace(self, arm: Arm, images: int) -> Trace:
        """See `Workload.trace`."""
        spec, factor = self.teacher.spec, self.trained.upsampler.factor
        views = draw_views(self.recipe.views, images, spec, factor)
        pixels = self._fake.tensor(images, 3, *arm.resolution)
        module = Autocast(self.trained, self.recipe.engine.precision)
        with self._metered(arm) as meter:
            meter.watch(self.teacher, "teacher")
            meter.watch(self.trained.consistency, "consistency")
            with meter.component("upsampler"):
                total = module(pixels, views).total
            meter.switch_to("upsampler")
            total.backward()
        return meter.trace(images)

    @property
    def statistics_images(self) -> int:
        """See `Workload.statistics_images`."""
        return self.recipe.targets.statistics_images
