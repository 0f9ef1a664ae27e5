"""The arms of a student's recipe, one for every size of its images."""

from collections.abc import Collection, Iterator
from itertools import pairwise

from distill.planning.step import Arm
from distill.recipe import StudentRecipe
from distill.resolution import ResolutionSchedule, SizeConfig


def student_arms(recipe: StudentRecipe, running: Collection[str]) -> Iterator[Arm]:
    """Every size of every arm, with the teachers that are run."""
    for name, config in recipe.placed_arms.items():
        seen_by = config.teachers or tuple(recipe.teachers)
        routes = {t: config.routes.get(t, "auto") for t in seen_by if t in running}
        sizes = config.resolution.root
        for size in sizes:
            batch = size.batch_size or config.batch_size
            micro = size.micro_batch_size or config.micro_batch_size or batch
            label = f" {size.size[0]} x {size.size[1]}" if len(sizes) > 1 else ""
            yield Arm(
                name,
                (name or "student") + label,
                size.size,
                batch,
                min(micro, batch),
                routes,
                _share(config.resolution, size, recipe.run.steps),
                config.ranks,
            )


def _share(schedule: ResolutionSchedule, size: SizeConfig, steps: int) -> float:
    """Of a run's steps, those that draw a size, on average."""
    edges = {0, steps, *(e for s in schedule.root for e in (s.start, s.end or steps) if e < steps)}
    total = 0.0
    for start, end in pairwise(sorted(edges)):
        active = [s for s in schedule.root if s.at(start)]
        if size in active:
            total += (end - start) * (size.probability or 1 / len(active))
    return total / steps
