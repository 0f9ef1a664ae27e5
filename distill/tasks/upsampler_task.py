"""The loop's task for an upsampler: upsampled maps must agree with a teacher's maps of views."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.engine.engine import Engine
from distill.engine.optimizer import ParameterGroup
from distill.objective.objective import LossTerms
from distill.parametrization.reparametrize import plain_weights
from distill.parametrization.spectral import SpectralScale, spectral_reparametrize
from distill.runtime import distributed, timing
from distill.runtime.run_folder import versions
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.training.arms import MicroBatch
from distill.training.training_recipe import resolved
from teachers.catalog import licence_of
from teachers.even_cells import even_encoder
from teachers.features import Features, FeatureSpec
from teachers.phi_s import PhiS
from teachers.teacher import Teacher
from teachers.upsamplers.build import build_upsampler
from teachers.upsamplers.consistency import Consistency, ConsistencyTerms
from teachers.upsamplers.downsampler import AttentionDownsampler
from teachers.upsamplers.fusion import FusionBlock
from teachers.upsamplers.jbu import JBU
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.trained import UpsamplerCard, save_upsampler
from teachers.upsamplers.upsampler import UpsampledFeatures
from teachers.upsamplers.views import ViewsConfig, sample_homographies, warp_images


class MultiView(nn.Module):
    """An upsampler and its loss, which has weights too, as one module with one forward pass.

    Args:
        upsampler: what is trained.
        consistency: the loss, with its downsampler and uncertainty network.
        teacher: the frozen encoder; kept out of the parameters and the checkpoints.
        magnifications: of the views, see `ViewsConfig.magnifications`; none for 1 each.
    """

    def __init__(
        self,
        upsampler: Standardised,
        consistency: Consistency,
        teacher: Teacher,
        magnifications: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.consistency = consistency
        self._magnifications = tuple(magnifications)
        self._teacher = (teacher,)  # in a tuple, where nn.Module does not look

    def forward(self, images: Tensor, homographies: Tensor) -> ConsistencyTerms:
        """The loss of images (B, 3, H, W) in [0, 1] and views of each, (B, n, 3, 3)."""
        (low, high), targets = self.upsample(images, homographies)
        seed = int(torch.randint(2**62, ()))
        return self.consistency(
            high.spatial,
            targets,
            homographies,
            low=low.spatial,
            images=images,
            generator=torch.Generator().manual_seed(seed),
        )

    def upsample(self, images: Tensor, homographies: Tensor) -> tuple[UpsampledFeatures, Tensor]:
        """The upsampled features, and the encoder's maps (B, n, D, h, w) of the views.

        The views join the first images that the upsampler encodes, so that the encoder runs once
        for most upsamplers.
        """
        (teacher,), upsampler = self._teacher, self.upsampler
        encoder, size = even_encoder(teacher), teacher.spec.resolution
        views = warp_images(images, homographies, size, self._magnifications)
        seen: list[Tensor] = []

        def encode(inputs: Tensor) -> Features:
            if seen:
                with timing.timed("teacher"):
                    return encoder(inputs)
            with timing.timed("teacher"):
                summary, spatial = encoder(torch.cat([inputs, views]))
            seen.append(spatial[len(inputs) :])
            summary = None if summary is None else summary[: len(inputs)]
            return Features(summary, spatial[: len(inputs)])

        features = upsampler.standardised(images, encode)
        targets = upsampler.standardise(seen[0])
        return features, targets.unflatten(0, homographies.shape[:2])


def build_multi_view(recipe: UpsamplerRecipe, teacher: Teacher, phi_s: PhiS) -> MultiView:
    """Builds the trained module; its initial weights depend on the recipe's seed only."""
    distributed.seed_default_generators(recipe.run.seed, "upsampler")
    inner = build_upsampler(recipe.upsampler, teacher.spec)
    upsampler = Standardised(inner, phi_s, bias=recipe.bias)
    dim, loss = teacher.spec.spatial_dim, recipe.consistency
    if inner.num_forwards == 1:  # without tiles there is no seam
        loss = loss.model_copy(update={"seam_weight": 1.0})
    consistency = Consistency(loss, dim, AttentionDownsampler(dim, inner.factor))
    closest = min(inner.factor)
    multi_view = MultiView(upsampler, consistency, teacher, recipe.views.magnifications(closest))
    if recipe.spectral:
        for module in inner.modules():
            if isinstance(module, FusionBlock):
                spectral_reparametrize(module)
    return multi_view


def parameter_groups(module: MultiView, recipe: UpsamplerRecipe) -> list[ParameterGroup]:
    """Groups the parameters by learning rate (FeatSharp's training code)."""
    rates, decay = recipe.rates, recipe.optimizer.weight_decay
    inner = module.upsampler.inner
    guides = [m for m in inner.modules() if isinstance(m, JBU)]
    guided = {p for guide in guides for p in guide.parameters()}
    if guided == set(inner.parameters()):  # alone it learns at the full rate
        guided = set()
    uncertainty_params = set(getattr(module.consistency.uncertainty, "parameters", lambda: ())())
    scales = {m.scale for m in module.modules() if isinstance(m, SpectralScale)}
    main = set(module.parameters()) - guided - uncertainty_params - scales
    members = {
        "main": (main, 0.0, 1.0),
        "guidance": (guided, 0.0, rates.guidance),
        "spectral": (scales, decay, rates.spectral),
        "uncertainty": (uncertainty_params, 0.0, rates.uncertainty),
    }
    groups = [
        ParameterGroup(name, [p for p in module.parameters() if p in chosen], *options)
        for name, (chosen, *options) in members.items()
    ]
    return [group for group in groups if group.parameters]


class UpsamplerTask:
    """Trains an upsampler in a module that the engine holds.

    The fingerprint is that of the teacher in float32.
    """

    def __init__(
        self,
        recipe: UpsamplerRecipe,
        module: MultiView,
        engine: Engine,
        teacher: Teacher,
        fingerprint: str,
    ) -> None:
        self.engine = engine
        self._recipe, self._module, self._teacher = recipe, module, teacher
        self._fingerprint = fingerprint

    def loss(self, images: Tensor, micro_batch: MicroBatch) -> LossTerms:
        """What a micro-batch of images (B, 3, H, W) in [0, 1] adds to the step's loss."""
        terms: ConsistencyTerms = self.engine(images, self._views(len(images)).to(images.device))
        return LossTerms(terms.total, terms.parts, {"mse": terms.mse}).scaled(micro_batch.share)

    def save(self, folder: Path) -> None:
        """Writes the upsampler as a file for use."""
        weights = plain_weights(self.engine.weights())
        if distributed.rank() == 0:
            card = upsampler_card(self._recipe, self._teacher.spec, self._fingerprint)
            save_upsampler(folder / "upsampler.safetensors", exported_tensors(weights), card)

    def load(self, folder: Path) -> None:
        """Does nothing: the engine has all that training changes."""

    def draw(self, images: Tensor, micro_batch: MicroBatch, path: Path) -> None:
        """Draws PCA panels of the encoder's map, bilinear and upsampled."""
        from distill.display.pictures import draw_maps

        self.engine.train(False)
        with torch.no_grad():
            shown = images[:4]
            (low, high), _ = self._module.upsample(shown, self._views(len(shown)).to(images.device))
        self.engine.train(True)
        if distributed.rank() == 0:
            draw_maps(path, shown, {"encoder": low.spatial, "upsampled": high.spatial})

    def _views(self, batch: int) -> Tensor:
        factor = self._module.upsampler.factor
        return draw_views(self._recipe.views, batch, self._teacher.spec, factor)


def draw_views(
    config: ViewsConfig, batch: int, spec: FeatureSpec, factor: tuple[int, int]
) -> Tensor:
    """Draws random views, (B, n, 3, 3) on the CPU, from torch's default generator.

    Args:
        config: the ranges.
        batch: images B.
        spec: of the encoder.
        factor: of the upsampler.
    """
    grid = scaled(spec.grid(*spec.resolution), factor)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    return sample_homographies(config, batch, grid, generator, closest=min(factor))


def exported_tensors(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of a `MultiView` that an upsampler's file has, by their names there.

    Args:
        weights: name to weight, without reparametrisation.
        prefix: of the names, if the module is part of another.
    """
    own = {f"{prefix}upsampler.": "", f"{prefix}consistency.downsampler.": "downsampler."}
    return {
        to + name.removeprefix(start): value
        for start, to in own.items()
        for name, value in weights.items()
        if name.startswith(start)
    }


def upsampler_card(recipe: UpsamplerRecipe, spec: FeatureSpec, fingerprint: str) -> UpsamplerCard:
    """The card of a recipe's upsampler, for an encoder with this spec and fingerprint."""
    plain = resolved(recipe)
    return UpsamplerCard(
        upsampler=plain["upsampler"],
        bias=recipe.bias,
        spec=spec,
        teacher=plain["teacher"],
        fingerprint=fingerprint,
        facts={"recipe": plain, "versions": versions(), "licence": licence_of(recipe.teacher)},
    )
