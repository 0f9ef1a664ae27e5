"""Every shipped recipe loads, and the upsamplers' are walked through at full size without weights.

Teachers and upsamplers are on the meta device, so nothing is downloaded and no map is ever there.
The numbers are the published ones, written out once more.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from distill.config import load_yaml
from distill.recipe import load_student_recipe
from distill.train_upsampler import base_resolution
from distill.upsampler_recipe import UpsamplerRecipe, load_upsampler_recipe
from distill.upsampler_task import MultiView, build_multi_view, parameter_groups
from teachers.build import build_teacher
from teachers.phi_s import PhiS
from teachers.teacher import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, Teacher

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
IMAGENET, OPENAI = (IMAGENET_MEAN, IMAGENET_STD), (OPENAI_MEAN, OPENAI_STD)
HALF = ((0.5,) * 3, (0.5,) * 3)


class Published(NamedTuple):
    """What is known of a teacher, and of the fusion block over two of its maps."""

    summary: int | None
    dim: int
    patch: int
    side: int
    grid: int
    pixels: tuple[tuple[float, ...], tuple[float, ...]]
    millions: float  # of the encoder
    hidden: int  # of the fusion's SwiGLU
    factor: int


TEACHERS = {
    "c_radio_l": Published(1024, 1024, 16, 512, 32, OPENAI, 304.2, 5464, 2),
    "clip_ti": Published(192, 192, 16, 128, 8, OPENAI, 3.8, 1024, 4),
    "dfn_clip_h": Published(1024, 1280, 14, 378, 27, OPENAI, 632.7, 6832, 3),
    "dinov2_l": Published(1024, 1024, 14, 448, 32, IMAGENET, 304.4, 5464, 2),
    "sam_h": Published(None, 1280, 16, 1024, 64, IMAGENET, 637.0, 6832, 2),
    "siglip2_g": Published(1536, 1536, 16, 384, 24, HALF, 1163.7, 8192, 3),
    "siglip2_so400m": Published(1152, 1152, 16, 512, 32, HALF, 428.8, 6144, 2),
    "siglip_so400m": Published(1152, 1152, 14, 378, 27, HALF, 428.2, 6144, 3),
    "siglip_ti": Published(192, 192, 16, 128, 8, HALF, 3.7, 1024, 4),
    "vit_s": Published(384, 384, 16, 224, 14, HALF, 21.7, 2048, 4),
}


def load(name: str, *overrides: str) -> UpsamplerRecipe:
    return load_upsampler_recipe(FOLDER / f"upsampler_{name}.yaml", list(overrides))


def build(recipe: UpsamplerRecipe) -> Teacher:
    return build_teacher(recipe.teacher, device="meta")


def assemble(recipe: UpsamplerRecipe, teacher: Teacher) -> MultiView:
    with torch.device("meta"):
        return build_multi_view(recipe, teacher, PhiS(teacher.spec.spatial_dim))


def inputs(recipe: UpsamplerRecipe, teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of one image, and its views."""
    images = torch.empty(1, 3, *base_resolution(recipe, teacher.spec), device="meta")
    views = recipe.views.num_views
    return images, torch.empty(1, views, 3, 3, dtype=torch.float64, device="meta")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path: Path) -> None:
    task = load_yaml(path)["task"]
    recipe = {"student": load_student_recipe, "upsampler": load_upsampler_recipe}[task](path, [])
    head = path.read_text().partition("\ntask:")[0]
    labels = re.findall(r"^# (\w+):", head, flags=re.MULTILINE)
    assert labels == ["Purpose", "Data", "Cost", "Expect", "Command"]
    assert f"recipes/{path.name}" in head
    assert path.stem in str(recipe.run.dir)


def test_the_table_of_recipes_names_every_one() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == [path.stem for path in RECIPES]


def test_every_upsampler_recipe_has_its_teacher_in_the_table_here() -> None:
    assert {f"upsampler_{name}" for name in TEACHERS} == {p.stem for p in RECIPES} - {"quickstart"}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_is_the_published_one(name: str) -> None:
    recipe, due = load(name), TEACHERS[name]
    teacher = build(recipe)
    spec = teacher.spec
    assert (spec.summary_dim, spec.spatial_dim, spec.patch_size) == due[:3]
    assert spec.resolution == (due.side, due.side)
    assert spec.grid(*spec.resolution) == (due.grid, due.grid)
    assert due.grid * spec.patch_size == due.side  # no pixel between two tiles is left out
    assert teacher.normalization == due.pixels
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(
        due.millions, abs=0.06
    )


@pytest.mark.parametrize("name", TEACHERS)
def test_a_full_size_step_has_the_shapes_it_should(name: str) -> None:
    """At the recipe's factor, through the loss and back to every parameter."""
    recipe, due = load(name), TEACHERS[name]
    teacher = build(recipe)
    module = assemble(recipe, teacher)
    assert module.upsampler.factor == (due.factor, due.factor)
    assert module.upsampler.num_forwards == 1 + due.factor**2
    assert module.upsampler.inner.fusion.down.in_features == due.hidden
    (low, high), targets = module.upsample(*inputs(recipe, teacher))
    fine = due.factor * due.grid
    assert low.spatial.shape == (1, due.dim, due.grid, due.grid)
    assert high.spatial.shape == (1, due.dim, fine, fine)
    assert targets.shape == (1, 5, due.dim, due.grid, due.grid)
    assert (None if high.summary is None else high.summary.shape[1]) == due.summary
    terms = module(*inputs(recipe, teacher))
    assert terms.total.shape == () and set(terms.parts) == {"reconstruction", "uncertainty"}
    terms.total.backward()
    groups = parameter_groups(module, recipe)
    assert [g.name for g in groups] == ["main", "guidance", "spectral", "uncertainty"]
    assert all(p.grad is not None for group in groups for p in group.parameters)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_recipe_takes_every_factor_from_2_to_4(name: str) -> None:
    due = TEACHERS[name]
    teacher = build(load(name))
    for factor in {2, 3, 4} - {due.factor}:
        recipe = load(name, f"upsampler.factor={factor}")
        module = assemble(recipe, teacher)
        (_, high), _ = module.upsample(*inputs(recipe, teacher))
        assert high.spatial.shape == (1, due.dim, factor * due.grid, factor * due.grid)


@pytest.mark.parametrize("name", sorted(set(TEACHERS) - {"clip_ti", "siglip_ti"}))
def test_large_recipes_keep_the_published_hyperparameters(name: str) -> None:
    recipe = load(name)
    optimizer, rates, upsampler = recipe.optimizer, recipe.rates, recipe.upsampler.model_dump()
    assert (recipe.run.steps, recipe.run.batch_size, recipe.run.micro_batch(8)) == (
        *(9000, 32),
        2 if name == "sam_h" else 4,
    )
    assert (optimizer.kind, optimizer.betas) == ("nadam", (0.9, 0.999))
    assert recipe.views.num_views == 5
    learning = [optimizer.lr * r for r in (1, rates.guidance, rates.spectral, rates.uncertainty)]
    assert learning == pytest.approx([5e-4, 1e-4, 5e-5, 1e-5])
    assert optimizer.weight_decay == 0.01  # of the spectral scales, and of nothing else
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps) == ("cosine", 100)
    assert recipe.schedule.final_ratio == 0 and recipe.engine.gradient_clipping == 5
    assert recipe.consistency.distance == "mse" and recipe.consistency.uncertainty
    assert recipe.consistency.seam_weight == 2
    assert recipe.consistency.tv_weight == recipe.consistency.crf_weight == 0
    assert recipe.bias and recipe.spectral
    assert recipe.targets.precision == "bf16" and recipe.targets.statistics_images == 96_000
    assert (upsampler["kind"], upsampler["inputs"]) == ("featsharp", ("jbu", "tiles"))
    assert (upsampler["window"], upsampler["num_heads"], upsampler["position"]) == (7, 16, "alibi")
