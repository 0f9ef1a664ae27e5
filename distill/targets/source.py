"""Sources of targets: teachers that run here, or, with the same interface, a cache of theirs.

A target is a teacher's features as the losses compare them: float32, its map standardised if the
recipe asks for it. `LiveTargets` runs the teachers; `tasks.cached_targets.CachedTargets` reads what
`distill.write_targets` wrote.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BeforeValidator, PositiveInt
from torch import Tensor

from distill.runtime.processor import measured_precision
from distill.targets.ensemble import Ensemble
from distill.targets.placement import Placement
from distill.targets.routes import RouteChoice
from distill.targets.target_statistics import Statistics
from teachers.config import StrictConfig
from teachers.features import Features


class TargetsConfig(StrictConfig):
    """How the teachers are run.

    Attributes:
        precision: `bf16` stores and computes the teachers' matrices in it; norms stay float32.
            `auto` as of the engine.
        compile: compiles the encoders and the fusion of upsamplers with `torch.compile`, at the
            first images of each size; this takes about a minute for a large encoder.
        statistics_images: images, over all ranks and arms, that the statistics of each teacher are
            estimated on, rounded up to whole steps.
        routes: teacher name to route, for those that `auto` does not decide; see `targets.routes`.
        placement: teacher name to where its weights wait while a student trains: `offloaded`, in
            host memory, or `sharded`, split over the ranks that run its arm. One block at a time
            comes to the device, and is not compiled. Without an entry they stay on the device.
        cached: a folder that `distill.write_targets` wrote. The student then trains on its targets
            and no teacher runs.
    """

    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(measured_precision)] = "fp32"
    compile: bool = False
    statistics_images: PositiveInt = 2048
    routes: dict[str, RouteChoice] = {}
    placement: dict[str, Placement] = {}
    cached: Path | None = None


class TargetSource(Protocol):
    """Gives a student its targets, with the statistics of the teachers."""

    statistics: Statistics

    def fingerprints(self) -> dict[str, str]:
        """Name to fingerprint of the teachers whose targets this rank has."""

    def __call__(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
        keys: Sequence[str] = (),
    ) -> dict[str, Features]:
        """The targets of each teacher.

        Args:
            images: (B, 3, H, W) in [0, 1], at the student's size.
            routes: teacher name to route, of the teachers that are wanted; None for all, by `auto`.
            view: gives the images that a teacher sees, by its name; a cache has one view only.
            keys: B keys of the images, which a cache finds them by.
        """


@dataclass
class LiveTargets:
    """Targets from teachers that run in this process, see `TargetSource`."""

    ensemble: Ensemble
    statistics: Statistics

    def fingerprints(self) -> dict[str, str]:
        """See `TargetSource`."""
        return self.ensemble.fingerprints()

    def __call__(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
        keys: Sequence[str] = (),
    ) -> dict[str, Features]:
        """See `TargetSource`."""
        features = self.ensemble(images, routes, view)
        return {name: self.statistics.apply(name, each) for name, each in features.items()}
