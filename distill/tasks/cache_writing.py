"""Runs a student's teachers once over its images and writes their targets to a cache."""

from collections import Counter
from pathlib import Path

from data.batch import Batch
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.runtime.process import reset_watchdog, watchdog
from distill.runtime.progress import tracked
from distill.runtime.run_folder import make_run_folder
from distill.targets.source import LiveTargets
from distill.targets.target_cache import CachePrecision, CacheWriter, views_of, write_header
from distill.tasks.build import build_targets, build_teachers, inherited_statistics
from distill.tasks.cached_targets import STATISTICS, cache_facts, group_of, require_free_folder
from distill.tasks.student_recipe import StudentRecipe
from distill.training.arms import MicroBatch
from distill.training.calibration import fit_statistics


def write_cache(recipe: StudentRecipe, folder: Path, precision: CachePrecision) -> None:
    """Writes the targets of every image of the run's steps, each of its views once.

    Every rank calls this and writes its share; rank 0 prints the number of views of each group.

    Args:
        recipe: gives teachers, images, sizes, routes and steps.
        folder: of the cache; absent or empty.
        precision: of the maps.

    Raises:
        RecipeError: a cache cannot hold the recipe's targets, or the folder is not empty.
    """
    _require_cacheable(recipe, precision)
    recipe.require_ranks(distributed.world_size())
    if distributed.rank() == 0:
        require_free_folder(folder)
    make_run_folder(recipe.run.dir)
    limit_s = recipe.run.watchdog_s
    with watchdog(limit_s), distributed.connected(limit_s, recipe.run.dir):
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
    plan = recipe.step_plan(distributed.world_size())
    mine = plan.teachers_of(distributed.rank())
    targets = build_targets(recipe, build_teachers(recipe, mine), mine)
    facts: dict[str, object] = {"cache": cache_facts(recipe)}
    inherited = inherited_statistics(recipe)
    fit_statistics(recipe, targets, plan, recipe.targets.statistics_images, facts, inherited)
    writer = CacheWriter(folder, precision, distributed.rank())
    batches = recipe.open_stream(plan).batches()
    for step in tracked(range(recipe.run.steps), "targets"):
        for micro_batch in plan.micro_batches(distributed.rank(), step):
            reset_watchdog()
            _add(writer, targets, next(batches), micro_batch)
    _finish(recipe, folder, precision, writer, targets)


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
    counts: Counter[str] = Counter()
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
