"""What a student run is: the owners' configs put together, and the checks that span them."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from distill.config import load_recipe
from distill.engine import why_no_whole_average
from distill.equivariance import ShiftConfig
from distill.evaluation.during_training import TrainingBenchmarksConfig
from distill.evaluation.fidelity import EvaluationConfig
from distill.finetuning import FinetuningConfig
from distill.objective import ObjectiveConfig
from distill.reparametrisation import ReparametrisationConfig
from distill.targets import TargetsConfig
from distill.training_recipe import RunConfig, TrainingRecipe
from distill.window_augmentation import WindowAugmentationConfig
from student.config import StudentConfig, StudentInit
from teachers.build import parse_teacher
from teachers.teacher import TeacherConfig
from teachers.upsamplers.resize import Factor

AnyTeacher = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_teacher)]


class StudentRun(RunConfig):
    """A student's run.

    Attributes:
        resolution: the student's input in pixels, one number or [height, width].
    """

    resolution: Factor


class StudentRecipe(TrainingRecipe):
    """A student and its teachers: `task: student`.

    Attributes:
        reparametrisation: what stands between weights and layers in training.
        window_augmentation: steps that attend within windows.
        finetuning: trains parts of `student.init` only; None trains all.
    """

    task: Literal["student"] = "student"
    run: StudentRun
    teachers: dict[str, AnyTeacher] = Field(min_length=1)
    student: StudentConfig
    targets: TargetsConfig = TargetsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reparametrisation: ReparametrisationConfig = ReparametrisationConfig()
    window_augmentation: WindowAugmentationConfig = WindowAugmentationConfig()
    finetuning: FinetuningConfig | None = None
    evaluation: EvaluationConfig | None = None
    benchmarks: TrainingBenchmarksConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.teachers:
            if not name.isidentifier():
                raise ValueError(f"teachers.{name}: a teacher's name is letters, digits and _")
        for name in self.objective.weights:
            if name not in self.teachers:
                known = ", ".join(self.teachers)
                raise ValueError(f"objective.weights.{name}: no such teacher; there are {known}")
        if self.student.head.only is not None:
            raise ValueError(
                "student.head.only: is for exported students; in training, leave a teacher out of "
                "teachers, or set its weights in objective.weights to 0"
            )
        self._check_resolution("run.resolution", self.run.resolution)
        self._check_shifts(self.run.resolution)
        self._check_reparametrisation()
        self._check_finetuning()
        problem = why_no_whole_average(self.engine) if self.objective.mesa else None
        if problem:
            raise ValueError(f"{problem}; or leave objective.mesa out")
        for number, resolution in enumerate(self.evaluation.resolutions if self.evaluation else ()):
            self._check_resolution(f"evaluation.resolutions.{number}", resolution)
        return self

    def _check_resolution(self, path: str, resolution: tuple[int, int]) -> None:
        patch = self.student.patch_size
        if any(side % patch for side in resolution):
            near = [max(patch, round(side / patch) * patch) for side in resolution]
            raise ValueError(
                f"{path}: {list(resolution)} px is no multiple of the student's "
                f"patch size of {patch}; the nearest that is: {near}"
            )

    def _check_shifts(self, resolution: tuple[int, int]) -> None:
        config, tokens = self.objective.equivariance, min(resolution) // self.student.patch_size
        if isinstance(config, ShiftConfig) and config.limit >= tokens:
            raise ValueError(
                f"objective.equivariance.limit: crops {config.limit} tokens apart share nothing "
                f"where a side has {tokens}; use at most {tokens - 1}, or a larger run.resolution"
            )

    def _check_reparametrisation(self) -> None:
        config = self.reparametrisation
        if self.student.activation_checkpointing and (config.spectral != "none" or config.damp):
            raise ValueError(
                "reparametrisation: a second forward pass would draw other noise and other norms; "
                "set student.activation_checkpointing to false, or leave it out"
            )

    def _check_finetuning(self) -> None:
        if self.finetuning is None:
            return
        if not isinstance(self.student.init, StudentInit):
            raise ValueError(
                "finetuning: trains parts of a trained student; give its file as student.init, "
                "{kind: student, path: ...}"
            )
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage: 3 splits frozen weights too, which finetuning would then save "
                "in part; use 1 or 2"
            )
        if self.reparametrisation.spectral != "none":
            raise ValueError(
                "reparametrisation.spectral: trains the norms of layers that finetuning freezes; "
                "leave one of them out"
            )


def load_student_recipe(path: Path, overrides: list[str]) -> StudentRecipe:
    """Reads a student's recipe; see `load_recipe`."""
    return load_recipe(StudentRecipe, path, overrides)
