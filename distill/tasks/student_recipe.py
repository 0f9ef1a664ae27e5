"""The recipe of a student: the sections of all rooms together, and checks between them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny, model_validator

from data.text import shown
from distill.benchmarks.during_training import TrainingBenchmarksConfig
from distill.benchmarks.fidelity import EvaluationConfig
from distill.engine.engine_config import why_no_whole_average
from distill.objective.objective import ObjectiveConfig
from distill.objective.views import ShiftConfig
from distill.parametrization.finetuning import FinetuningConfig
from distill.parametrization.reparametrize import ReparametrizationConfig
from distill.runtime.config import load_yaml, validate
from distill.tasks.student_kind import override_student
from distill.tasks.window_augmentation import WindowAugmentationConfig, fitting_windows
from distill.training.arms import ArmConfig, StepPlan, place_of
from distill.training.resolution import ResolutionSchedule
from distill.training.training_recipe import RunConfig, TrainingRecipe
from student.config import StudentInit
from student.timm_config import AnyStudentConfig, StudentSection, TimmStudentConfig
from teachers.build import parse_teacher
from teachers.messages import did_you_mean
from teachers.teacher import Teacher, TeacherConfig

_LONGEST_NAME = 100  # bytes in UTF-8: names are parts of file names
_NAMES = f"letters, digits and _, at most {_LONGEST_NAME} of them"
_ONLY_VIT = "is only for student.kind: vit, as it is made of attention and linear layers"
AnyTeacher = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_teacher)]


def _is_name(name: str) -> bool:
    return name.isidentifier() and len(name.encode()) <= _LONGEST_NAME


class StudentRun(RunConfig):
    """A student's run; in a recipe with `arms`, these have the sizes and batches instead.

    Attributes:
        resolution: the student's input in pixels, one number or [height, width]; or a list of
            sizes with probabilities and stages, see `SizeConfig`.
        batch_size: images of one optimiser step, over all ranks.
        micro_batch_size: images of one forward pass on one rank; gradients of the others are
            accumulated. None, or a number above a rank's share, is the whole share.
    """

    resolution: ResolutionSchedule | None = None
    batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None


class StudentRecipe(TrainingRecipe):
    """A student and its teachers: `task: student`.

    Attributes:
        arms: name to arm, for steps with several image sizes, or with teachers that see some of
            the images only; an empty mapping is one arm with all teachers, of `run.resolution`.
        reparametrisation: of the student's layers, during training only.
        window_augmentation: steps with attention within windows.
        finetuning: trains parts of `student.init` only; None trains all.
    """

    task: Literal["student"] = "student"
    run: StudentRun
    teachers: dict[str, AnyTeacher] = Field(min_length=1)
    arms: dict[str, ArmConfig] = Field({})
    student: StudentSection
    objective: ObjectiveConfig = ObjectiveConfig()
    reparametrisation: ReparametrizationConfig = ReparametrizationConfig()
    window_augmentation: WindowAugmentationConfig = WindowAugmentationConfig()
    finetuning: FinetuningConfig | None = None
    evaluation: EvaluationConfig | None = None
    benchmarks: TrainingBenchmarksConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.teachers:
            if not _is_name(name):
                raise ValueError(f"teachers.{shown(name)}: a teacher's name is {_NAMES}")
        self._require_teachers("objective.weights", self.objective.weights)
        self._require_teachers("targets.routes", self.targets.routes)
        self._require_teachers("targets.placement", self.targets.placement)
        if not isinstance(self.student, TimmStudentConfig):
            self._require_teachers("student.isolated", self.student.isolated)
        self._require_teachers("student.head.upsample", self.student.head.upsample)
        self._check_arms()
        if self.student.head.only is not None:
            raise ValueError(
                "student.head.only: is for exported students; in training, remove a teacher from "
                "teachers, or set its weights in objective.weights to 0"
            )
        for place, size in self._sizes():
            self._check_resolution(place, size)
            self._check_shifts(place, size)
        self._check_cached()
        self._check_windows()
        self._check_reparametrisation()
        self._check_finetuning()
        problem = why_no_whole_average(self.engine) if self.objective.mesa else None
        if problem:
            raise ValueError(f"{problem}; or remove objective.mesa")
        for number, resolution in enumerate(self.evaluation.resolutions if self.evaluation else ()):
            self._check_resolution(f"evaluation.resolutions.{number}", resolution)
        return self

    @property
    def placed_arms(self) -> dict[str, ArmConfig]:
        """The arms, with the routes of `targets.routes`; one with an empty name without `arms`."""
        arms = self.arms
        if not arms:
            run = self.run.model_dump(include={"resolution", "batch_size", "micro_batch_size"})
            arms = {"": ArmConfig.model_validate(run)}
        return {
            name: arm.model_copy(update={"routes": {**self.targets.routes, **arm.routes}})
            for name, arm in arms.items()
        }

    @property
    def largest_resolution(self) -> tuple[int, int]:
        """(height, width) of the largest images that the run trains on."""
        sizes = [size.size for arm in self.placed_arms.values() for size in arm.resolution.root]
        return max(sizes, key=lambda size: size[0] * size[1])

    def step_plan(self, ranks: int, *, margin: int = 0) -> StepPlan:
        """The micro-batches of each of `ranks` processes; for the margin see `StepPlan`.

        Raises:
            RecipeError: the processes cannot share the batches.
        """
        teachers, seed = list(self.teachers), self.run.seed
        return StepPlan(self.placed_arms, teachers, seed=seed, ranks=ranks, margin=margin)

    def require_ranks(self, ranks: int) -> None:
        """See `TrainingRecipe`."""
        self.step_plan(ranks)

    def cell_sizes(self, teachers: Mapping[str, Teacher]) -> dict[str, int]:
        """Teacher name to the pixels of a cell of the grid that its route is chosen for."""
        return {name: self.student.cell_size(name, t.spec) for name, t in teachers.items()}

    def running(self, teachers: Mapping[str, Teacher]) -> dict[str, Teacher]:
        """Those of the teachers that any loss needs; the others are never run."""
        return {n: t for n, t in teachers.items() if self.objective.losses_of(n, t.spec)}

    def _check_arms(self) -> None:
        for key in ("resolution", "batch_size", "micro_batch_size"):
            given = getattr(self.run, key) is not None
            if self.arms and given:
                raise ValueError(f"run.{key}: the recipe has arms; set it in each of them instead")
            if not self.arms and not given and key != "micro_batch_size":
                raise ValueError(
                    f"run.{key}: required, but not given, because the recipe has no arms"
                )
        for name, arm in self.arms.items():
            if not _is_name(name):
                raise ValueError(f"arms.{shown(name)}: an arm's name is {_NAMES}")
            self._require_teachers(f"arms.{name}.teachers", arm.teachers or ())
            self._require_teachers(f"arms.{name}.routes", arm.routes)
        without = [name for name, arm in self.arms.items() if arm.ranks is None]
        if 0 < len(without) < len(self.arms):
            raise ValueError(
                f"arms.{without[0]}.ranks: other arms have ranks of their own; set it in every "
                "arm, or in none"
            )
        for name in self.teachers if self.arms else ():
            if not any(arm.teachers is None or name in arm.teachers for arm in self.arms.values()):
                raise ValueError(
                    f"teachers.{name}: no arm names it; add it to the teachers of an arm, or "
                    "remove it from the recipe"
                )

    def _require_teachers(self, place: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.teachers:
                hint, known = did_you_mean(name, self.teachers), ", ".join(self.teachers)
                raise ValueError(f"{place}.{name}: no such teacher{hint}; there are {known}")

    def _sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for name, arm in self.placed_arms.items():
            place = f"{place_of(name)}.resolution"
            for number, size in enumerate(arm.resolution.root):
                alone = len(arm.resolution.root) == 1
                yield place if alone else f"{place}.{number}.size", size.size

    def _check_resolution(self, path: str, resolution: tuple[int, int]) -> None:
        patch = self.student.patch_size
        if any(side % patch for side in resolution):
            near = [max(patch, round(side / patch) * patch) for side in resolution]
            raise ValueError(
                f"{path}: expected multiples of the student's patch size of {patch} px, got "
                f"{list(resolution)}; the nearest are {near}"
            )

    def _check_shifts(self, place: str, resolution: tuple[int, int]) -> None:
        config, tokens = self.objective.equivariance, min(resolution) // self.student.patch_size
        if isinstance(config, ShiftConfig) and config.limit >= tokens:
            raise ValueError(
                f"objective.equivariance.limit: crops {config.limit} tokens apart do not overlap "
                f"with {tokens} tokens on a side; use at most {tokens - 1}, or a larger {place}"
            )

    def _check_cached(self) -> None:
        if self.targets.cached is None:
            return
        if self.objective.equivariance is not None:
            raise ValueError(
                "objective.equivariance: draws new views in every step, which a cache cannot hold; "
                "remove it, or targets.cached"
            )
        if self.targets.placement:
            raise ValueError(
                "targets.placement: no teacher runs with targets.cached; set only one of them"
            )

    def _check_windows(self) -> None:
        config, patch = self.window_augmentation, self.student.patch_size
        if config.probability and isinstance(self.student, TimmStudentConfig):
            raise ValueError(f"window_augmentation: {_ONLY_VIT}; remove it")
        grids = {(size[0] // patch, size[1] // patch) for _, size in self._sizes()}
        if config.probability and not any(fitting_windows(config, grid) for grid in grids):
            fits = {s for h, w in grids for s in range(2, max(h, w)) if h % s == w % s == 0}
            cure = f"use some of {sorted(fits)}" if fits else "remove window_augmentation"
            raise ValueError(
                f"window_augmentation.sizes: none of {list(config.sizes)} divides a grid of the "
                f"student, {' or '.join(f'{h} x {w}' for h, w in sorted(grids))}; {cure}"
            )

    def _check_reparametrisation(self) -> None:
        config = self.reparametrisation
        if isinstance(self.student, TimmStudentConfig):
            for key in ("spectral", "damp"):
                if getattr(config, key) not in ("none", 0):
                    raise ValueError(f"reparametrisation.{key}: {_ONLY_VIT}; remove it")
        if self.student.activation_checkpointing and (config.spectral != "none" or config.damp):
            raise ValueError(
                "reparametrisation: recomputed activations would have other noise and norms; set "
                "student.activation_checkpointing to false, or remove reparametrisation"
            )

    def _check_finetuning(self) -> None:
        if self.finetuning is None:
            return
        if not isinstance(self.student.init, StudentInit):
            raise ValueError(
                "finetuning: needs a trained student; give its file as student.init, "
                "{kind: student, path: ...}"
            )
        if isinstance(self.student, TimmStudentConfig) and self.finetuning.trunk == "low_rank":
            raise ValueError(f"finetuning.trunk: low_rank {_ONLY_VIT}; use frozen")
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage: 3 splits frozen weights too, and finetuning would save a part "
                "of them; use 1 or 2"
            )
        if self.reparametrisation.spectral != "none":
            raise ValueError(
                "reparametrisation.spectral: trains the norms of layers that finetuning freezes; "
                "set only one of them"
            )


def cells_of(student: AnyStudentConfig) -> dict[str, Any]:
    """What the grids of a student's targets depend on, besides their sizes and teachers."""
    if isinstance(student, TimmStudentConfig):
        return {"patch_size": student.patch_size, "upsample": dict(student.head.upsample)}
    return {"patch_size": student.patch_size}


def load_student_recipe(path: Path, overrides: list[str]) -> StudentRecipe:
    """Reads a student's recipe and applies overrides, see `override_student`.

    Raises:
        RecipeError: lists every error with its path.
    """
    tree = load_yaml(path)
    override_student(tree, overrides)
    return validate(StudentRecipe, tree, str(path))
