"""Images to what the teachers ask of the student: frozen, standardised, in float32.

Teachers live here, outside the module that DeepSpeed trains, so that they never reach an
optimiser or a checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from distill.runtime import distributed, timing
from distill.targets.placement import Placement, place_teacher
from distill.targets.routes import Route, RouteChoice, choose_route
from distill.targets.target_statistics import (
    IN_CHECKPOINT,
    StatisticsPass,
    TargetStatistics,
    load_statistics,
    save_statistics,
    statistics_fingerprint,
)
from teachers.features import Features
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize


class TargetsConfig(BaseModel):
    """How the teachers are run.

    Attributes:
        precision: `bf16` stores and computes the teachers' matrices in it; norms stay float32.
        compile: has `torch.compile` make kernels of encoders and of upsamplers' fusion, at the
            first images of each size; about a minute for a large encoder.
        statistics_images: images, over all ranks, that each teacher's standardisation is estimated
            on, rounded up to whole steps; those of all its arms together.
        routes: teacher to route, for those that are not left to `auto`; see `targets.routes`.
        placement: teacher to where its weights wait while a student trains, for those that are not
            on the device as a whole: `offloaded`, in host memory; `sharded`, in parts over the
            ranks that run its arm. A block at a time comes to the device, and is not compiled.
        cached: a folder that `distill.write_targets` wrote, which then stands for the teachers:
            a student trains without running any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    statistics_images: PositiveInt = 2048
    routes: dict[str, RouteChoice] = {}
    placement: dict[str, Placement] = {}
    cached: Path | None = None


class CalibrationBatch(NamedTuple):
    """Images that statistics are estimated on.

    Attributes:
        images: this rank's, (B, 3, H, W) in [0, 1].
        routes: teacher to route, for the teachers that see them.
        before: teacher to the images that it has seen on all ranks before this step.
    """

    images: Tensor
    routes: Mapping[str, RouteChoice]
    before: Mapping[str, int]


class Targets:
    """The teachers that are run, and what standardises their maps.

    Args:
        teachers: name to teacher, those that this rank runs.
        student_patch: the student's patch size in pixels, which decides on routes; None where
            there is no student, and each teacher sees its native resolution.
        phi_s: whether targets are standardised; statistics may be set for their dispersion alone.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], student_patch: int | None, *, phi_s: bool = True
    ) -> None:
        self.teachers = dict(teachers)
        self.statistics: dict[str, TargetStatistics] = {}
        self.patch, self._phi_s = student_patch, phi_s
        self._fingerprints: dict[str, str] = {}
        self._routes: dict[tuple[str, tuple[int, int], RouteChoice], Route] = {}

    def fingerprints(self) -> dict[str, str]:
        """Teacher name to its fingerprint, see `teacher_fingerprint`; taken once."""
        for name, teacher in self.teachers.items():
            if name not in self._fingerprints:
                self._fingerprints[name] = teacher_fingerprint(teacher)
        return dict(self._fingerprints)

    def place(self, placement: Mapping[str, Placement], peers: distributed.Peers) -> None:
        """Puts teachers that were built in host memory where they belong.

        Args:
            placement: teacher to place.
            peers: the ranks that run the same arms.
        """
        self.fingerprints()  # of whole weights
        for name, where in placement.items():
            if name in self.teachers:
                place_teacher(self.teachers[name], where, peers)

    def features(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
    ) -> dict[str, Features]:
        """The teachers' own features.

        Args:
            images: (B, 3, H, W) in [0, 1], at the student's size where there is one.
            routes: teacher to route, for those that are run; None for all, by themselves.
            view: teacher name to what it sees in the images' place, of the same shape.
        """
        if routes is None:
            routes = dict.fromkeys(self.teachers, "auto")
        return {
            name: self._encode(name, view(name) if view else images, choice)
            for name, choice in routes.items()
            if name in self.teachers
        }

    def _encode(self, name: str, images: Tensor, choice: RouteChoice) -> Features:
        with timing.timed(f"teacher/{name}"):
            return self._routed(name, images, choice)

    def _routed(self, name: str, images: Tensor, choice: RouteChoice) -> Features:
        teacher = self.teachers[name]
        if self.patch is None:
            return teacher(resize(images, teacher.spec.resolution))
        key = name, (images.shape[-2], images.shape[-1]), choice
        if key not in self._routes:
            self._routes[key] = choose_route(teacher, key[1], self.patch, choice)
        return self._routes[key].encode(teacher, images)

    def __call__(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
        keys: Sequence[str] = (),
    ) -> dict[str, Features]:
        """The teachers' targets: their `features`, standardised where the recipe asks for it.

        Args:
            images: as for `features`.
            routes: as for `features`.
            view: as for `features`.
            keys: of the images; read where a cache stands for the teachers.
        """
        features = self.features(images, routes, view)
        return {name: self.standardise(name, f) for name, f in features.items()}

    def standardise(self, name: str, features: Features) -> Features:
        """Standardises one teacher's map, where the recipe asks for it."""
        if not self._phi_s:
            return features
        with torch.no_grad():
            return features._replace(spatial=self.statistics[name].phi_s(features.spatial))

    def dispersions(self) -> dict[str, Tensor]:
        """Teacher name to angular dispersion of its summaries, ()."""
        device = distributed.device()
        return {name: s.dispersion.to(device) for name, s in self.statistics.items()}

    def save(self, folder: Path) -> None:
        """Writes the statistics as a checkpoint keeps them."""
        for name, statistics in self.statistics.items():
            save_statistics(folder / f"{name}.safetensors", statistics, IN_CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Goes back to the statistics of a checkpoint, whatever has been estimated since.

        Raises:
            ValueError: those of a teacher are missing.
        """
        for name in self.statistics:
            path = folder / f"{name}.safetensors"
            statistics = load_statistics(path, IN_CHECKPOINT)
            if statistics is None:
                raise ValueError(f"{path}: missing, or not the statistics of a checkpoint")
            phi_s = statistics.phi_s.to(distributed.device())
            self.statistics[name] = statistics._replace(phi_s=phi_s)

    def fit(
        self,
        shown: Iterator[CalibrationBatch],
        folder: Path,
        facts: Mapping[str, object],
        num_images: int,
        inherited: Mapping[str, TargetStatistics] | None = None,
    ) -> dict[str, str]:
        """Estimates the statistics on all ranks, or reads them where they lie in a folder.

        Every rank gets those of every teacher that some rank runs.

        Args:
            shown: this rank's images, step by step; read only when needed.
            folder: `<teacher>.safetensors` are read from and written to it.
            facts: what else the estimate depends on: data, sizes, number of images.
            num_images: images that each teacher sees, over all ranks, in whole steps.
            inherited: statistics that stand already, by teacher.

        Returns:
            Teacher name to `estimated`, `cached` or `inherited`.
        """
        own = {
            name: (statistics_fingerprint(fingerprint, facts), self.teachers[name].spec)
            for name, fingerprint in self.fingerprints().items()
        }
        every = {n: known for each in distributed.gather_objects(own) for n, known in each.items()}
        inherited = inherited or {}
        found = {
            name: inherited.get(name)
            or load_statistics(folder / f"{name}.safetensors", fingerprint)
            for name, (fingerprint, _) in every.items()
        }
        # Ranks may look at a shared folder at different moments: rank 0's view decides.
        missing = distributed.broadcast_object([name for name, s in found.items() if s is None])
        if missing:
            passes = {name: StatisticsPass(every[name][1]) for name in missing}
            self._show(shown, passes, num_images)
            for name, each in passes.items():
                found[name] = estimate = each.finish()
                if distributed.rank() == 0:
                    save_statistics(folder / f"{name}.safetensors", estimate, every[name][0])
            distributed.barrier()
        device = distributed.device()
        # Heads of teachers that do not run keep theirs too: an export to their space needs it.
        for name, statistics in {**inherited, **found}.items():
            assert statistics is not None
            self.statistics[name] = statistics._replace(phi_s=statistics.phi_s.to(device))
        kinds = dict.fromkeys(found, "cached") | dict.fromkeys(missing, "estimated")
        return kinds | dict.fromkeys(inherited.keys() & found.keys(), "inherited")

    def _show(
        self,
        shown: Iterator[CalibrationBatch],
        passes: Mapping[str, StatisticsPass],
        num_images: int,
    ) -> None:
        """Runs each teacher until it has seen enough; which step that is, all ranks know."""
        for images, routes, before in shown:
            due = {name for name in passes if before[name] < num_images}
            if not due:
                return
            wanted = {name: choice for name, choice in routes.items() if name in due}
            for name, features in self.features(images, wanted).items():
                passes[name].update(features)
