"""Targets out of a cache in the place of teachers that run: the same interface, no encoder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.runtime import distributed, timing
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import difference
from distill.targets.routes import Route, RouteChoice, Size, choose_route
from distill.targets.target_cache import TargetCache, views_of
from distill.targets.target_statistics import load_statistics
from distill.targets.targets import Targets
from distill.tasks.route_table import route_rows
from distill.tasks.student_recipe import StudentRecipe
from teachers.features import Features
from teachers.teacher import Teacher

STATISTICS = "statistics"  # the folder of a cache's, and in the place of their fingerprint


def cache_facts(recipe: StudentRecipe) -> dict[str, Any]:
    """What cached targets depend on, beside the images and the routes to them."""
    data, objective = recipe.data, recipe.objective
    views: dict[str, Any] = {"decoder": data.decoder, "draft": data.draft}
    views["augmentation"] = data.model_dump(mode="json")["augmentation"]
    if data.augmentation != "none":
        views["seed"] = recipe.run.seed
    return {
        "data": views,
        "targets": {"precision": recipe.targets.precision},
        "student": {"patch_size": recipe.student.patch_size},
        "objective": {"standardisation": objective.standardisation},
        "teachers": {
            name: config.model_dump(mode="json", exclude={"chunk_size"})
            for name, config in recipe.teachers.items()
        },
    }


def group_of(
    name: str, teacher: Teacher, size: Size, patch: int | None, choice: RouteChoice
) -> str:
    """Where a cache keeps a teacher's targets for students of a size."""
    assert patch is not None  # there is a student
    return _group(name, choose_route(teacher, size, patch, choice), size)


def _group(name: str, route: Route, size: Size) -> str:
    return f"{name}-{route.kind}-{size[0]}x{size[1]}"


class CachedTargets(Targets):
    """The targets of a recipe out of its cache.

    Args:
        recipe: names the cache.
        teachers: all of its teachers, for what they promise; on the meta device they will do.

    Raises:
        RecipeError: the cache is of other teachers, views or sizes; names the difference.
    """

    def __init__(self, recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> None:
        assert recipe.targets.cached is not None
        super().__init__({}, recipe.student.patch_size)
        self._cache = TargetCache(recipe.targets.cached)
        self._promised = dict(teachers)
        running = {n for n, t in teachers.items() if recipe.objective.runs(n, t.spec)}
        self._check(recipe, running)
        for name in sorted(running):
            path = self._cache.folder / STATISTICS / f"{name}.safetensors"
            statistics = load_statistics(path, STATISTICS)
            if statistics is None:
                raise RecipeError(f"targets.cached: {path}: missing, or damaged")
            phi_s = statistics.phi_s.to(distributed.device())
            self.statistics[name] = statistics._replace(phi_s=phi_s)

    def _check(self, recipe: StudentRecipe, running: set[str]) -> None:
        folder, facts = self._cache.folder, self._cache.facts
        ours = cache_facts(recipe)
        ours["teachers"] = {n: c for n, c in ours["teachers"].items() if n in running}
        theirs = {key: facts[key] for key in ours}
        theirs["teachers"] = {n: c for n, c in facts["teachers"].items() if n in running}
        found = difference(theirs, ours)
        if found:
            raise RecipeError(
                f"targets.cached: {folder} was written by another recipe ({found}); give it the "
                "same, or write a cache of its own"
            )
        for row in route_rows(recipe, self._promised):
            group = _group(row.teacher, row.route, row.student)
            if group not in self._cache.groups:
                raise RecipeError(
                    f"targets.cached: {folder} has no {group} (teacher, route, student's size); "
                    f"it has {', '.join(self._cache.groups)}"
                )

    def fingerprints(self) -> dict[str, str]:
        """Those of the teachers that wrote the cache."""
        return {n: f for n, f in self._cache.facts["fingerprints"].items() if n in self.statistics}

    def __call__(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
        keys: Sequence[str] = (),
    ) -> dict[str, Features]:
        """See `Targets`; every image needs its key, and all teachers see the student's view."""
        size = (images.shape[-2], images.shape[-1])
        found = {}
        with timing.timed("cache"):
            views = views_of(images, keys)
            for name, choice in (routes or dict.fromkeys(self.statistics, "auto")).items():
                if name in self.statistics:
                    group = group_of(name, self._promised[name], size, self.patch, choice)
                    found[name] = self._cache.read(group, views, images.device)
        return found


def cache_folder_is_free(folder: Path) -> None:
    """Refuses to write a cache over anything.

    Raises:
        RecipeError: something lies there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder}: is not empty; give another folder, or remove it")
