"""Every shipped recipe loads, and the upsamplers' are walked through at full size without weights.

Teachers and upsamplers are on the meta device, so nothing is downloaded and no map is ever there.
The numbers are the published ones, written out once more.
"""

import re
import resource
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill.evaluation.comparison import ComparisonRecipe
from distill.evaluation.results import ReportRecipe
from distill.evaluation.suite import SuiteRecipe
from distill.evaluation.throughput import ThroughputRecipe
from distill.objective.objective_config import ObjectiveConfig
from distill.objective.views import ShiftConfig
from distill.parametrization.reparametrize import ReparametrizationConfig
from distill.runtime.config import load_recipe, load_yaml, validate
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from distill.tasks.student_run import preview
from distill.tasks.upsampler_recipe import UpsamplerRecipe, load_upsampler_recipe
from distill.tasks.upsampler_task import MultiView, build_multi_view, parameter_groups
from student.config import StudentConfig
from teachers.build import build_teacher
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from teachers.phi_s import PhiS
from teachers.teacher import Teacher
from teachers.upsamplers.build import parse_upsampler
from teachers.upsamplers.kinds import UPSAMPLERS

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
    "clip_ti": Published(192, 192, 16, 128, 8, OPENAI, 3.8, 512, 4),
    "dfn_clip_h": Published(1024, 1280, 14, 378, 27, OPENAI, 632.7, 6832, 3),
    "dinov2_l": Published(1024, 1024, 14, 448, 32, IMAGENET, 304.4, 5464, 2),
    # Three class tokens; and a table of 128 x 128 positions, 16.8 million, where ViT-L has 0.2.
    "radio_v2.5_l": Published(3072, 1024, 16, 512, 32, OPENAI, 319.9, 5464, 2),
    "sam_h": Published(None, 1280, 16, 1024, 64, IMAGENET, 637.0, 6832, 2),
    "siglip2_g": Published(1536, 1536, 16, 384, 24, HALF, 1163.7, 8192, 3),
    "siglip2_so400m": Published(1152, 1152, 16, 512, 32, HALF, 428.8, 6144, 2),
    "siglip_so400m": Published(1152, 1152, 14, 378, 27, HALF, 428.2, 6144, 3),
    "siglip_ti": Published(192, 192, 16, 128, 8, HALF, 3.7, 512, 4),
    "vit_s": Published(384, 384, 16, 224, 14, HALF, 21.7, 2048, 4),
}


def load(name: str, *overrides: str) -> UpsamplerRecipe:
    return load_upsampler_recipe(FOLDER / f"upsampler_{name}.yaml", list(overrides))


@cache
def teacher_of(name: str) -> Teacher:
    return build_teacher(load(name).teacher, device="meta")


def assemble(recipe: UpsamplerRecipe, teacher: Teacher) -> MultiView:
    with torch.device("meta"):
        return build_multi_view(recipe, teacher, PhiS(teacher.spec.spatial_dim))


def inputs(module: MultiView) -> tuple[torch.Tensor, torch.Tensor]:
    """One image at the size that the tiles see, and its five views."""
    (fh, fw), (height, width) = module.upsampler.factor, module.upsampler.spec.resolution
    images = torch.empty(1, 3, fh * height, fw * width, device="meta")
    return images, torch.empty(1, 5, 3, 3, dtype=torch.float64, device="meta")


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
    first = (FOLDER / "README.md").read_text().partition("\n## ")[0]
    listed = re.findall(r"^\| `([\w.]+)` \|", first, flags=re.MULTILINE)
    assert sorted(listed) == [path.stem for path in RECIPES]


def test_every_upsampler_recipe_has_its_teacher_in_the_table_here() -> None:
    upsamplers = {path.stem for path in RECIPES if path.stem.startswith("upsampler_")}
    assert upsamplers == {f"upsampler_{name}" for name in TEACHERS}


def test_the_routes_of_two_arms_are_those_that_the_page_shows() -> None:
    recipe = load_student_recipe(FOLDER / "two_arms.yaml", [])
    recipe.require_ranks(1)
    recipe.require_ranks(2)
    shown = (FOLDER / "README.md").read_text().partition("recipes/two_arms.yaml --dry-run\n")[2]
    assert shown.startswith(preview(recipe) + "\n```")


@pytest.mark.long
@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_is_the_published_one(name: str) -> None:
    teacher, due = teacher_of(name), TEACHERS[name]
    spec = teacher.spec
    assert (spec.summary_dim, spec.spatial_dim, spec.patch_size) == due[:3]
    assert spec.resolution == (due.side, due.side)
    assert spec.grid(*spec.resolution) == (due.grid, due.grid)
    assert due.grid * spec.patch_size == due.side  # no pixel between two tiles is left out
    assert teacher.normalization == due.pixels
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(
        due.millions, abs=0.06
    )


@pytest.mark.long
@pytest.mark.parametrize("name", TEACHERS)
def test_a_full_size_step_reaches_every_parameter(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe, due = load(name), TEACHERS[name]
    module = assemble(recipe, teacher_of(name))
    assert module.upsampler.factor == (due.factor, due.factor)
    assert module.upsampler.num_forwards == 1 + due.factor**2
    assert module.upsampler.inner.fusion.down.in_features == due.hidden
    terms = module(*inputs(module))
    assert terms.total.shape == ()
    assert set(terms.parts) == {"reconstruction", "uncertainty"}
    terms.total.backward()
    groups = parameter_groups(module, recipe)
    spectral = ["spectral"] if recipe.spectral else []
    guidance = ["guidance"] if "jbu" in recipe.upsampler.model_dump()["inputs"] else []
    assert [g.name for g in groups] == ["main", *guidance, *spectral, "uncertainty"]
    assert all(p.grad is not None for group in groups for p in group.parameters)
    # SAM-H alone would take 2.5 GB, and its maps more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.long
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_recipe_takes_every_factor_and_gives_its_grid(name: str, factor: int) -> None:
    due = TEACHERS[name]
    # The spectral norms of full-size weights are half of the time, and change no shape.
    recipe = load(name, f"upsampler.factor={factor}", "spectral=false")
    module = assemble(recipe, teacher_of(name))
    (low, high), targets = module.upsample(*inputs(module))
    fine = factor * due.grid
    assert low.spatial.shape == (1, due.dim, due.grid, due.grid)
    assert high.spatial.shape == (1, due.dim, fine, fine)
    assert targets.shape == (1, 5, due.dim, due.grid, due.grid)
    summary = None if high.summary is None else high.summary.shape[1]
    assert summary == due.summary


@pytest.mark.parametrize("name", sorted(set(TEACHERS) - {"clip_ti", "siglip_ti"}))
def test_large_recipes_keep_the_published_hyperparameters(name: str) -> None:
    recipe = load(name)
    optimizer, rates, upsampler = recipe.optimizer, recipe.rates, recipe.upsampler.model_dump()
    plan = recipe.step_plan((8, 8), "t", ranks=8)
    assert (recipe.run.steps, recipe.run.batch_size, plan.micro_batches(0, 0)[0].images) == (
        *(9000, 32),
        2 if name == "sam_h" else 4,
    )
    assert (optimizer.kind, optimizer.betas) == ("nadam", (0.9, 0.999))
    assert recipe.views.num_views == 5
    learning = [optimizer.lr * r for r in (1, rates.guidance, rates.spectral, rates.uncertainty)]
    assert learning == pytest.approx([5e-4, 1e-4, 5e-5, 1e-5])
    assert optimizer.weight_decay == 0.01  # of the spectral scales, and of nothing else
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps) == ("cosine", 100)
    assert (recipe.schedule.final_ratio, recipe.engine.gradient_clipping) == (0, 5)
    consistency = recipe.consistency
    assert (consistency.distance, consistency.seam_weight) == ("mse", 2)
    assert (consistency.tv_weight, consistency.crf_weight, consistency.mmd_weight) == (0, 0, 0)
    assert (consistency.uncertainty, recipe.bias, recipe.spectral) == (True, True, True)
    assert (recipe.targets.precision, recipe.targets.statistics_images) == ("bf16", 96_000)
    assert (upsampler["kind"], upsampler["inputs"]) == ("featsharp", ("jbu", "tiles"))
    assert (upsampler["layer_scale"], upsampler["sigma"]) == (1e-6, 1)
    assert (upsampler["window"], upsampler["num_heads"], upsampler["position"]) == (7, 16, "alibi")


def test_recipes_of_evaluations_load() -> None:
    kinds = {
        "report": ReportRecipe,
        "throughput": ThroughputRecipe,
        "upsamplers": ComparisonRecipe,
    }
    found = {path.stem: path for path in (FOLDER / "evaluation").glob("*.yaml")}
    assert found.keys() >= kinds.keys()
    for name, path in found.items():
        kind = kinds.get(name, SuiteRecipe)
        assert load_recipe(kind, path, []).task == (name if name in kinds else "benchmarks")


def test_the_table_of_upsamplers_has_every_kind_with_its_options_and_defaults() -> None:
    lines = (FOLDER / "README.md").read_text().splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    table = {row[0].strip("`"): row[3] for row in rows if row[0].strip("`") in UPSAMPLERS.table}
    assert table.keys() == UPSAMPLERS.table.keys() - {"trained"}
    for kind, cell in table.items():
        written = dict(re.findall(r"`(\w+): ([^`]+)`", cell))
        config = parse_upsampler({"kind": kind, "factor": 2})
        assert config is not None
        defaults = config.model_dump(mode="json", exclude={"kind", "factor"})
        assert written.keys() == defaults.keys(), kind
        for name, value in defaults.items():
            shown = f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower()
            assert written[name] == shown, (kind, name)


def _student_fragments(folder: Path) -> list[dict[str, Any]]:
    """The two of the recipes' README: C-RADIOv4's set, and fine-tuning."""
    text = (FOLDER / "README.md").read_text()
    found = []
    for number, block in enumerate(re.findall(r"```yaml\n(student:.*?)```", text, re.DOTALL)):
        path = folder / f"{number}.yaml"
        path.write_text(block)
        found.append(load_yaml(path))
    return found


def test_the_fragments_of_student_options_make_valid_recipes(tmp_path: Path) -> None:
    def complete(fragment: dict[str, Any], teachers: list[str]) -> StudentRecipe:
        entry = {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"}
        base = {
            "task": "student",
            "run": {"dir": "unused", "steps": 1000, "batch_size": 2, "resolution": 432},
            "data": {"sources": [{"shards": "unused"}]},
            "teachers": dict.fromkeys(teachers, entry),
        }
        return validate(StudentRecipe, {**base, **fragment}, "README")

    like_v4, more = _student_fragments(tmp_path)
    recipe = complete(like_v4, ["siglip2", "dinov3", "sam3"])
    assert recipe.student.count_registers(3) == 7
    assert isinstance(recipe.objective.equivariance, ShiftConfig)
    tuned = complete(more, ["clip", "siglip", "new"])
    assert tuned.finetuning is not None
    assert tuned.student.isolated == ("new",)


def test_the_table_of_student_options_has_their_defaults() -> None:
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \|", text, flags=re.MULTILINE)
    table = dict(row for row in rows if "." in row[0])
    sections = {
        "objective": ObjectiveConfig(),
        "reparametrisation": ReparametrizationConfig(),
        "student": StudentConfig(),
    }
    shown = {}
    for path in table:
        section, *keys = path.split(".")
        value: Any = sections[section]
        for key in keys:
            value = getattr(value, key)
        off = value is None or value == {}
        texts = {str: f"`{value}`", bool: f"{value}".lower()}
        shown[path] = "none" if off else texts.get(type(value)) or f"{value:g}"
    assert len(table) == 13
    assert table == shown
