"""Measures the agreement of a student's heads with their teachers over a range of resolutions.

It detects mode switching (Heinrich et al., RADIOv2.5, 2024, arXiv 2412.07679): the features of
early RADIO students changed abruptly above some resolution, so that agreement fell from one size
to the next.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from data.files import write_json_lines
from data.images import load_images
from data.labelled.image_surveys import ImagesSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement, metric_key
from distill.benchmarks.fidelity import Agreement, measure
from distill.display.text import chart_text
from distill.runtime import distributed
from distill.runtime.progress import tracked
from distill.tasks.stored_student import StoredStudent
from distill.tasks.trained import find_trained, load_trained
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from teachers.upsamplers.resize import Size2d


class ResolutionSweepConfig(BenchmarkConfig):
    """Config of `ResolutionSweep`.

    Attributes:
        images: a folder, archive or shards of images that the run does not train on.
        resolutions: sizes of the student's input in pixels, at least two, each one number or
            [height, width]; neighbours by area are compared.
        batch_size: images of one forward pass.
    """

    kind: str = "resolution_sweep"
    images: Path
    resolutions: Annotated[tuple[Size2d, ...], Field(min_length=2)]
    batch_size: PositiveInt = 8


class ResolutionSweep(Benchmark):
    """Agreement of each head with its teacher by resolution; needs a student and its run.

    Metrics: `largest_cosine_drop`, the largest fall of a head's spatial cosine from one resolution
    to the next larger one, 0 if none falls; and the lowest cosine and fidelity of each head. All
    points of the curves, with mean squared errors, are written to `curves.jsonl` and drawn in
    `curves.png`. Every rank measures all images.
    """

    Config = ResolutionSweepConfig
    seeded = False
    lower_is_better = frozenset({"largest_cosine_drop"})

    def survey(self) -> Survey:
        """The images."""
        return ImagesSurvey(self.config.images)

    def check(self, encoder: Teacher) -> None:
        """Checks that it is a student with a run; see `Benchmark.check`."""
        if not isinstance(encoder, StoredStudent) or encoder.config.exported:
            raise TeacherError(
                "resolution_sweep: compares a student with the teachers of its run, so the model "
                "must be {kind: student, path: RUN}, the folder of a run or of a checkpoint"
            )

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Measures at all resolutions; see `Benchmark.measure`."""
        config: ResolutionSweepConfig = self.config
        self.check(encoder)
        assert isinstance(encoder, StoredStudent)
        trained = find_trained(encoder.config.path, [])
        students, targets = load_trained(trained)
        student = {"it": students["untrained" if encoder.config.untrained else "trained"]}
        if encoder.head is not None:
            targets.ensemble.teachers = {encoder.head: targets.ensemble.teachers[encoder.head]}
        sizes = sorted(set(config.resolutions), key=lambda size: (prod(size), size))
        curves: dict[str, list[Agreement]] = {name: [] for name in targets.ensemble.teachers}
        for size in tracked(sizes, "resolutions"):
            images, names = load_images(config.images, size)
            measured = measure(student, targets, images, config.batch_size)
            for name, agreements in measured.items():
                curves[name].append(agreements["it"])
        if distributed.rank() == 0:
            _write(folder, sizes, curves)
        protocol = {
            "images": len(names),
            "step": trained.step,
            "standardisation": trained.recipe.objective.standardisation,
        }
        return Measurement(_metrics(curves), protocol)


def largest_drop(values: Sequence[float]) -> float:
    """The largest fall from one value to the next; 0 if they never fall."""
    return max([0.0, *(one - other for one, other in pairwise(values))])


def _metrics(curves: Mapping[str, Sequence[Agreement]]) -> dict[str, float]:
    cosines = {name: [at.spatial_cosine for at in curve] for name, curve in curves.items()}
    metrics = {"largest_cosine_drop": max(largest_drop(curve) for curve in cosines.values())}
    for name, curve in curves.items():
        metrics[metric_key(f"{name}_lowest_cosine")] = min(cosines[name])
        metrics[metric_key(f"{name}_lowest_fidelity")] = min(at.fidelity for at in curve)
    return metrics


def _write(
    folder: Path, sizes: Sequence[tuple[int, int]], curves: Mapping[str, Sequence[Agreement]]
) -> None:
    rows: list[dict[str, Any]] = [
        {"teacher": name, "resolution": list(size)} | agreement._asdict()
        for name, curve in curves.items()
        for size, agreement in zip(sizes, curve, strict=True)
    ]
    write_json_lines(folder / "curves.jsonl", rows)
    _draw(folder / "curves.png", sizes, curves)


def _draw(
    path: Path, sizes: Sequence[tuple[int, int]], curves: Mapping[str, Sequence[Agreement]]
) -> None:
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    titles = {
        "spatial_cosine": "spatial cosine",
        "fidelity": "fidelity",
        "spatial_mse": "mean squared error",
    }
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    sides = [prod(size) ** 0.5 for size in sizes]
    for axis, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(sides, [getattr(at, key) for at in curve], "o-", label=chart_text(name))
        axis.set(xlabel="resolution, px", title=title)
        axis.set_xticks(sides, [f"{side:.0f}" for side in sides])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
