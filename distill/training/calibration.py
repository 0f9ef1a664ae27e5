"""Fits the statistics of targets on images of the run, in an order of their own."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

from data.stream import TrainStream
from distill.runtime import distributed
from distill.runtime.tracking import log
from distill.targets.source import LiveTargets
from distill.targets.target_statistics import CalibrationBatch, TargetStatistics
from distill.training.arms import StepPlan
from distill.training.training_recipe import TrainingRecipe


def fit_statistics(
    recipe: TrainingRecipe,
    targets: LiveTargets,
    plan: StepPlan,
    num_images: int,
    facts: Mapping[str, object],
    inherited: Mapping[str, TargetStatistics] | None = None,
) -> None:
    """Fits the statistics of targets, or reads them from the run's folder; every rank calls this.

    Args:
        recipe: the run's.
        targets: the teachers that this rank runs; gets the statistics of all teachers.
        plan: the sizes at which each teacher sees the images.
        num_images: images that each teacher sees, over all ranks.
        facts: what the statistics depend on, besides teachers, images and their number.
        inherited: see `Statistics.fit`.
    """
    stream = recipe.open_stream(plan, purpose="statistics")
    facts = {"stream": stream.state()["identity"], "images": num_images, **facts}
    folder, batches = recipe.run.dir / "statistics", _calibration_batches(stream, plan)
    fit = targets.statistics.fit
    outcome = fit(targets.ensemble, batches, folder, facts, num_images, inherited)
    log.info("statistics over %d images: %s", num_images, outcome)


def _calibration_batches(stream: TrainStream, plan: StepPlan) -> Iterator[CalibrationBatch]:
    batches, num_before = stream.batches(), Counter[str]()
    for step in itertools.count():
        for micro_batch in plan.micro_batches(distributed.rank(), step):
            images = next(batches).pixels(distributed.device())
            yield CalibrationBatch(images, micro_batch.routes, num_before.copy())
        num_before.update(plan.images_of(step))
