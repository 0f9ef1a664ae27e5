"""The cache of a recipe's targets: written once by its teachers, then read in their place.

The format of the files is that of `targets.target_cache`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.batch import Batch
from data.files import write_text
from data.stream import TrainStream
from distill.runtime import distributed, timing
from distill.runtime.errors import RecipeError
from distill.runtime.processor import warn_of_slow_bf16
from distill.runtime.progress import tracked
from distill.runtime.resuming import changes
from distill.runtime.run_folder import make_folder
from distill.runtime.stopping import Stopped, agreed_steps
from distill.runtime.tracking import log
from distill.targets.ensemble import Ensemble
from distill.targets.routes import Route, RouteChoice, Size
from distill.targets.source import LiveTargets
from distill.targets.target_cache import (
    UNFINISHED,
    CachePrecision,
    CacheWriter,
    TargetCache,
    ViewKey,
    stored_views,
    views_of,
    write_header,
)
from distill.targets.target_statistics import Statistics
from distill.tasks.build import (
    build_targets,
    build_teachers,
    fingerprints_of,
    inherited_statistics,
    teacher_dtype,
)
from distill.tasks.route_table import route_rows
from distill.tasks.student_recipe import StudentRecipe, cells_of
from distill.training.arms import MicroBatch
from distill.training.calibration import fit_statistics
from teachers.build import build_teacher
from teachers.errors import TeacherError
from teachers.features import Features
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher

STATISTICS = "statistics"  # a folder of the cache; stands for the fingerprint in its files


def cache_facts(recipe: StudentRecipe) -> dict[str, Any]:
    """What cached targets depend on, besides the images and the routes."""
    data, objective = recipe.data, recipe.objective
    views: dict[str, Any] = {"decoder": data.decoder, "draft": data.draft}
    views |= data.crop_facts
    if data.augmentation != "none":
        views["seed"] = recipe.run.seed
    return {
        "data": views,
        "targets": {"precision": recipe.targets.precision},
        "student": cells_of(recipe.student),
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
        self._ensemble = Ensemble(running, recipe.cell_sizes(running))  # for its routes
        self._check(recipe, teachers)
        self.statistics = Statistics()
        self.statistics.load(self._cache.folder / STATISTICS, sorted(running), STATISTICS)

    def _check(self, recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> None:
        folder, facts, running = self._cache.folder, self._cache.facts, self._ensemble.teachers
        ours = cache_facts(recipe)
        ours["teachers"] = {n: c for n, c in ours["teachers"].items() if n in running}
        theirs = {key: facts[key] for key in ours}
        theirs["teachers"] = {n: c for n, c in facts["teachers"].items() if n in running}
        moved = [name for name in running if self._is_moved(recipe, theirs, ours, name)]
        for name in moved:
            theirs["teachers"][name] = ours["teachers"][name]
        if found := [change for change in changes(theirs, ours) if change.key != "data.decoder"]:
            raise RecipeError(
                f"targets.cached: {folder} was written by another recipe "
                f"({'; '.join(map(str, found))}); change the recipe, or write another cache"
            )
        for row in route_rows(recipe, teachers):
            group = group_of(row.teacher, row.route, row.student)
            if group not in self._cache.groups:
                raise RecipeError(
                    f"targets.cached: {folder} has no {group} (teacher, route, student's size); "
                    f"it has {', '.join(self._cache.groups)}"
                )

    def _is_moved(
        self, recipe: StudentRecipe, theirs: dict[str, Any], ours: dict[str, Any], name: str
    ) -> bool:
        """Whether a teacher's entry differs, but gives the same teacher, which is loaded to tell.

        For example by another path of its weights.
        """
        there, here = theirs["teachers"].get(name), ours["teachers"][name]
        if there is None or there == here or there["kind"] != here["kind"]:
            return False
        if theirs["targets"] != ours["targets"]:
            return False
        try:
            loaded = build_teacher(recipe.teachers[name], dtype=teacher_dtype(recipe))
        except TeacherError:
            return False
        same: bool = teacher_fingerprint(loaded) == self._cache.facts["fingerprints"].get(name)
        return same

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


def write_cache(recipe: StudentRecipe, folder: Path, precision: CachePrecision) -> None:
    """Writes the targets of every image of the run's steps, each of its views once.

    Every rank calls this and writes its share; rank 0 prints the number of views of each group.

    Args:
        recipe: gives teachers, images, sizes, routes and steps.
        folder: of the cache; absent, empty, or of this command when it was stopped or killed.
        precision: of the maps.

    Raises:
        RecipeError: a cache cannot hold the recipe's targets, or the folder is not empty.
    """
    _require_cacheable(recipe, precision)
    recipe.require_ranks(distributed.world_size())
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if distributed.rank() == 0 and used and not (folder / UNFINISHED).is_file():
        raise RecipeError(f"{folder}: is not empty; give another folder, or remove it")
    make_folder(recipe.run.dir, "run.dir")
    with distributed.connected(recipe.run.ranks_wait_s, recipe.run.dir):
        _write(recipe, folder, precision)


def _require_cacheable(recipe: StudentRecipe, precision: CachePrecision) -> None:
    if recipe.targets.cached is not None:
        raise RecipeError("targets.cached: this command writes the cache; remove the key here")
    if recipe.objective.equivariance is not None:
        raise RecipeError(
            "objective.equivariance: draws new views in every step, which a cache cannot hold; "
            "remove it"
        )
    if precision == "int8" and recipe.objective.standardisation != "phi_s":
        raise RecipeError(
            "--precision int8: has one scale for all channels, which need PHI-S to be alike; set "
            "objective.standardisation to phi_s, or use --precision fp16"
        )


def _write(recipe: StudentRecipe, folder: Path, precision: CachePrecision) -> None:
    warn_of_slow_bf16({"targets.precision": recipe.targets.precision})
    plan = recipe.step_plan(distributed.world_size())
    mine = plan.teachers_of(distributed.rank())
    targets = build_targets(recipe, build_teachers(recipe, mine), mine)
    facts: dict[str, object] = {"cache": cache_facts(recipe)}
    inherited = inherited_statistics(recipe, fingerprints_of(targets))
    fit_statistics(recipe, targets, plan, recipe.targets.statistics_images, facts, inherited)
    kept = _begin(folder, _unfinished(recipe, precision, targets.statistics))
    writer = CacheWriter(folder, precision, distributed.rank(), kept)
    stream = recipe.open_stream(plan)
    batches = stream.batches()
    try:
        for step in agreed_steps(tracked(range(_steps(recipe, stream)), "targets")):
            for micro_batch in plan.micro_batches(distributed.rank(), step):
                _add(writer, targets, next(batches), micro_batch)
    except Stopped:
        writer.finish()
        raise
    _finish(recipe, folder, precision, writer, targets)


def _steps(recipe: StudentRecipe, stream: TrainStream) -> int:
    """The steps whose images a cache must hold: the run's, or fewer where crops repeat."""
    steps, enough = recipe.run.steps, stream.steps_of_all_crops
    if enough is None:
        return steps
    if enough > steps:
        log.warning(
            "the cache holds what %d steps show; from run.steps=%d on it holds every crop of every "
            "image, and serves runs of any length",
            *(steps, enough),
        )
    elif enough < steps:
        log.info("after %d of %d steps every crop of every image was seen", enough, steps)
    return min(steps, enough)


def _unfinished(
    recipe: StudentRecipe, precision: CachePrecision, statistics: Statistics
) -> dict[str, Any]:
    """What a cache must agree in with the command that goes on with it; JSON-able."""
    digests = {}
    for name, each in statistics.of.items():
        digest = hashlib.sha256()
        for tensor in each.phi_s.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        digests[name] = digest.hexdigest()
    facts = {**cache_facts(recipe), "precision": precision, "statistics": digests}
    return dict(json.loads(json.dumps(facts)))


def _begin(folder: Path, facts: dict[str, Any]) -> dict[str, set[ViewKey]]:
    """Begins a cache, or goes on with one; returns group to the views that it has."""
    marker, found = folder / UNFINISHED, None
    if distributed.rank() == 0 and marker.is_file():
        found = json.loads(marker.read_text(encoding="utf-8"))
    elif distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(marker, json.dumps(facts, indent=1))
    found = distributed.broadcast_object(found)
    if found is None:
        return {}
    if differing := changes(found, facts):
        raise RecipeError(
            f"{folder}: holds the unfinished cache of another recipe "
            f"({'; '.join(map(str, differing))}); give another folder, or remove it"
        )
    kept = {group: set(views) for group, views in stored_views(folder).items()}
    log.info("%s: goes on after %d views", folder, sum(map(len, kept.values())))
    return kept


def _add(writer: CacheWriter, targets: LiveTargets, batch: Batch, micro_batch: MicroBatch) -> None:
    ensemble, images = targets.ensemble, batch.pixels(distributed.device())
    views, size = views_of(images, batch.keys), (images.shape[-2], images.shape[-1])
    for name, choice in micro_batch.routes.items():
        if name not in ensemble.teachers:  # all of its losses have weight zero
            continue
        group = group_of(name, ensemble.route(name, size, choice), size)
        new = writer.missing(group, views)
        if new:
            found = targets(images[new], {name: choice})[name]
            writer.add(group, [views[number] for number in new], found)


def _finish(
    recipe: StudentRecipe,
    folder: Path,
    precision: CachePrecision,
    writer: CacheWriter,
    targets: LiveTargets,
) -> None:
    counts: Counter[str] = Counter(writer.num_kept)
    fingerprints: dict[str, str] = {}
    for views, own in distributed.gather_objects((writer.finish(), targets.fingerprints())):
        counts.update(views)
        fingerprints |= own
    if distributed.rank() == 0:
        targets.statistics.save(folder / STATISTICS, STATISTICS)
        facts = {**cache_facts(recipe), "precision": precision, "views": counts}
        write_header(folder, {**facts, "fingerprints": fingerprints})
        for group, count in sorted(counts.items()):
            print(f"{group}: {count} views", flush=True)
