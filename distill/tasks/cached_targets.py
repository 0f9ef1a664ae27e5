"""Targets from a cache instead of teachers that run, and the facts that a cache depends on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.runtime import timing
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import difference
from distill.targets.ensemble import Ensemble
from distill.targets.routes import Route, RouteChoice, Size
from distill.targets.target_cache import TargetCache, views_of
from distill.targets.target_statistics import Statistics
from distill.tasks.route_table import route_rows
from distill.tasks.student_recipe import StudentRecipe
from teachers.features import Features
from teachers.teacher import Teacher

STATISTICS = "statistics"  # a folder of the cache; stands for the fingerprint in its files


def cache_facts(recipe: StudentRecipe) -> dict[str, Any]:
    """What cached targets depend on, besides the images and the routes."""
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


def group_of(name: str, route: Route, size: Size) -> str:
    """The folder of a cache with a teacher's targets by one route, for students of one size."""
    return f"{name}-{route.kind}-{size[0]}x{size[1]}"


class CachedTargets:
    """The targets of a recipe from its cache, see `TargetSource`.

    Args:
        recipe: names the cache.
        teachers: all of its teachers, for their specs; they may be on the meta device.

    Raises:
        RecipeError: the cache was written for other teachers, views or sizes; names the difference.
    """

    def __init__(self, recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> None:
        assert recipe.targets.cached is not None
        self._cache = TargetCache(recipe.targets.cached)
        running = recipe.running(teachers)
        self._ensemble = Ensemble(running, recipe.student.patch_size)  # for its routes
        self._check(recipe, teachers)
        self.statistics = Statistics()
        self.statistics.load(self._cache.folder / STATISTICS, sorted(running), STATISTICS)

    def _check(self, recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> None:
        folder, facts, running = self._cache.folder, self._cache.facts, self._ensemble.teachers
        ours = cache_facts(recipe)
        ours["teachers"] = {n: c for n, c in ours["teachers"].items() if n in running}
        theirs = {key: facts[key] for key in ours}
        theirs["teachers"] = {n: c for n, c in facts["teachers"].items() if n in running}
        found = difference(theirs, ours)
        if found:
            raise RecipeError(
                f"targets.cached: {folder} was written by another recipe ({found}); change the "
                "recipe, or write another cache"
            )
        for row in route_rows(recipe, teachers):
            group = group_of(row.teacher, row.route, row.student)
            if group not in self._cache.groups:
                raise RecipeError(
                    f"targets.cached: {folder} has no {group} (teacher, route, student's size); "
                    f"it has {', '.join(self._cache.groups)}"
                )

    def fingerprints(self) -> dict[str, str]:
        """Name to fingerprint of the teachers that the cache was written with."""
        stored, running = self._cache.facts["fingerprints"], self._ensemble.teachers
        return {name: fingerprint for name, fingerprint in stored.items() if name in running}

    def __call__(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
        keys: Sequence[str] = (),
    ) -> dict[str, Features]:
        """See `TargetSource`; every image needs its key, and all teachers see the same images."""
        size = (images.shape[-2], images.shape[-1])
        running = self._ensemble.teachers
        found = {}
        with timing.timed("cache"):
            views = views_of(images, keys)
            for name, choice in (routes or dict.fromkeys(running, "auto")).items():
                if name in running:
                    group = group_of(name, self._ensemble.route(name, size, choice), size)
                    found[name] = self._cache.read(group, views, images.device)
        return found


def require_free_folder(folder: Path) -> None:
    """Makes sure that a cache is not written over anything.

    Raises:
        RecipeError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder}: is not empty; give another folder, or remove it")
