"""Writes a cache of targets: `python -m distill.write_targets RECIPE FOLDER [key=value ...]`.

The teachers run once over the images of a student's recipe, those of its `run.steps`, at its sizes
and by its routes; each image in each of its views is kept once. A recipe with `targets.cached:
FOLDER` then trains without them. Under `deepspeed` every rank writes its share.
"""

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import get_args

from data.batch import Batch
from distill.runtime import distributed
from distill.runtime.command import command
from distill.runtime.errors import RecipeError
from distill.runtime.progress import tracked
from distill.runtime.run_folder import make_run_folder
from distill.runtime.tracking import log
from distill.targets.target_cache import CachePrecision, CacheWriter, views_of, write_header
from distill.targets.target_statistics import save_statistics
from distill.targets.targets import Targets
from distill.tasks.build import build_targets, build_teachers, inherited_statistics
from distill.tasks.cached_targets import STATISTICS, cache_facts, cache_folder_is_free, group_of
from distill.tasks.kinds import register_kinds
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from distill.training.arms import MicroBatch
from distill.training.session import fit_targets, open_stream


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.write_targets",
        description="Run a student's teachers once and keep their targets, for runs that train "
        "without teachers by targets.cached=FOLDER.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a student's YAML file")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the cache goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--precision",
        choices=get_args(CachePrecision),
        default="int8",
        help="of the maps; int8 needs objective.standardisation=phi_s (default)",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args()


@command
def main() -> None:
    """The command."""
    register_kinds()
    options = parse_arguments()
    recipe = load_student_recipe(options.recipe, options.overrides)
    _check(recipe, options.precision)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)
    recipe.require_ranks(distributed.world_size())
    if distributed.rank() == 0:
        cache_folder_is_free(options.folder)
    make_run_folder(recipe.run.dir)
    with distributed.connected(recipe.run.watchdog_s, recipe.run.dir):
        _write(recipe, options.folder, options.precision)


def _check(recipe: StudentRecipe, precision: CachePrecision) -> None:
    if recipe.targets.cached is not None:
        raise RecipeError("targets.cached: is what this command writes; leave it out here")
    if recipe.objective.equivariance is not None:
        raise RecipeError(
            "objective.equivariance: draws views of its own in every step, which no cache can "
            "hold; leave it out"
        )
    if precision == "int8" and recipe.objective.standardisation != "phi_s":
        raise RecipeError(
            "--precision int8: has one scale for all channels, which PHI-S makes alike; set "
            "objective.standardisation to phi_s, or take --precision fp16"
        )


def _write(recipe: StudentRecipe, folder: Path, precision: CachePrecision) -> None:
    plan = recipe.step_plan(distributed.world_size())
    mine = plan.teachers_of(distributed.rank())
    targets = build_targets(recipe, build_teachers(recipe, mine), mine)
    facts: dict[str, object] = {"cache": cache_facts(recipe)}
    inherited = inherited_statistics(recipe)
    fit_targets(recipe, targets, plan, recipe.targets.statistics_images, facts, inherited)
    writer = CacheWriter(folder, precision, distributed.rank())
    batches = open_stream(recipe, plan).batches()
    for step in tracked(range(recipe.run.steps), "targets"):
        for micro_batch in plan.micro_batches(distributed.rank(), step):
            batch = next(batches)
            _add(writer, targets, batch, micro_batch)
    _finish(recipe, folder, precision, writer, targets)


def _add(writer: CacheWriter, targets: Targets, batch: Batch, micro_batch: MicroBatch) -> None:
    images, keys = batch.pixels(distributed.device()), batch.keys
    views, size = views_of(images, keys), (images.shape[-2], images.shape[-1])
    for name, choice in micro_batch.routes.items():
        if name not in targets.teachers:  # no loss counts for it
            continue
        group = group_of(name, targets.teachers[name], size, targets.patch, choice)
        new = writer.missing(group, views)
        if new:
            found = targets(images[new], {name: choice})[name]
            writer.add(group, [views[number] for number in new], found)


def _finish(
    recipe: StudentRecipe,
    folder: Path,
    precision: CachePrecision,
    writer: CacheWriter,
    targets: Targets,
) -> None:
    counts: Counter[str] = Counter()
    fingerprints: dict[str, str] = {}
    for views, own in distributed.gather_objects((writer.finish(), targets.fingerprints())):
        counts.update(views)
        fingerprints |= own
    if distributed.rank() == 0:
        for name, statistics in targets.statistics.items():
            save_statistics(folder / STATISTICS / f"{name}.safetensors", statistics, STATISTICS)
        facts = {**cache_facts(recipe), "precision": precision, "views": counts}
        write_header(folder, {**facts, "fingerprints": fingerprints})
        for group, count in sorted(counts.items()):
            print(f"{group}: {count} views", flush=True)


if __name__ == "__main__":
    main()
