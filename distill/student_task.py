"""What the loop trains when it trains a student: teachers, objective, student, and its files."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill.engine.engine import Engine
from distill.evaluation.student_encoder import StudentEncoder
from distill.objective import mesa
from distill.objective.objective import LossTerms, Objective
from distill.objective.views import build_views, central_crop
from distill.parametrization.finetuning import freeze
from distill.parametrization.reparametrize import materialised, reparametrise
from distill.recipe import StudentRecipe
from distill.route_table import route_rows
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS, RecipeError
from distill.runtime.tracking import log
from distill.targets.routes import choose_route
from distill.targets.targets import Targets
from distill.training.arms import Pass
from distill.window_augmentation import draw_window
from student.config import StudentInit
from student.model import Student, StudentOutput
from student.storage import save_student, student_of
from teachers.build import TEACHERS, build_teacher
from teachers.catalog import licence_of
from teachers.compiled import compile_teacher
from teachers.dry_run import dry_run
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.teacher import Teacher


def build_teachers(
    recipe: StudentRecipe,
    names: Collection[str] | None = None,
    *,
    in_host: Collection[str] = (),
) -> dict[str, Teacher]:
    """Builds every teacher of a recipe, on this process's device, and checks the user's own.

    Args:
        recipe: names them.
        names: those that this rank runs; None for all. The others, and those that no loss counts
            for, come without weights, on the meta device, for what they promise.
        in_host: those that stay in host memory, uncompiled, until `Targets.place`.

    Raises:
        RecipeError: a teacher cannot be built or breaks the contract; names its entry.
    """
    teachers = {}
    dtype = torch.bfloat16 if recipe.targets.precision == "bf16" else None
    for name, config in recipe.teachers.items():
        runs = (names is None or name in names) and recipe.objective.weights_of(name).count
        here = torch.device("cpu") if name in in_host else distributed.device()
        device = here if runs else torch.device("meta")
        try:
            teachers[name] = build_teacher(config, device=device, dtype=dtype)
            if runs and not TEACHERS.is_built_in(config.kind):
                dry_run(teachers[name])
            log.info("teacher %s: %s", name, licence_of(config))
        except USER_ERRORS as error:
            raise RecipeError(f"teachers.{name}: {error}") from error
        except Exception as error:
            if runs or TEACHERS.is_built_in(config.kind):
                raise
            raise RecipeError(
                f"teachers.{name}: cannot be built without its weights, on torch's meta device, as "
                f"it is for a dry run and on ranks that leave it to others ({error}); its "
                "constructor may load weights, but not read values"
            ) from error
        if runs and recipe.targets.compile and name not in in_host:
            compile_teacher(teachers[name])
    return teachers


def build_student(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> Student:
    """Builds the student; its initial weights depend on the recipe's seed only."""
    distributed.seed_default_generators(recipe.run.seed, "student")
    return Student(recipe.student, {name: teacher.spec for name, teacher in teachers.items()})


def prepare_student(
    student: Student, recipe: StudentRecipe, teachers: Mapping[str, Teacher]
) -> None:
    """Makes of a student, in place, what is trained: frozen parts, reparametrised weights."""
    if recipe.finetuning is not None:
        assert isinstance(recipe.student.init, StudentInit)
        running = [name for name, t in teachers.items() if recipe.objective.runs(name, t.spec)]
        freeze(student, recipe.student.init, recipe.finetuning, running)
    reparametrise(student, recipe.reparametrisation)


def build_targets(
    recipe: StudentRecipe,
    teachers: Mapping[str, Teacher],
    names: Collection[str] | None = None,
) -> Targets:
    """The teachers that any loss of the recipe counts for; the others are never run.

    Args:
        recipe: the student's.
        teachers: all of its teachers.
        names: those that this rank runs, if any loss counts for them; None for all.

    Raises:
        RecipeError: none counts, or one has no route to a size of the student's.
    """
    running = {n: t for n, t in teachers.items() if recipe.objective.runs(n, t.spec)}
    if not running:
        raise RecipeError(
            "objective.weights: every weight is zero, so there is nothing to learn; leave one "
            "teacher's spatial or summary weight above 0"
        )
    route_rows(recipe, teachers)
    for name, teacher in running.items():
        _check_evaluation(recipe, name, teacher)
    here = {name: t for name, t in running.items() if names is None or name in names}
    phi_s = recipe.objective.standardisation == "phi_s"
    return Targets(here, recipe.student.patch_size, phi_s=phi_s)


def _check_evaluation(recipe: StudentRecipe, name: str, teacher: Teacher) -> None:
    """Refuses what the teacher would refuse at the first held-out image."""
    for size in recipe.evaluation.resolutions if recipe.evaluation else ():
        try:
            choose_route(teacher, size, recipe.student.patch_size)
        except TeacherError as error:
            raise RecipeError(f"teachers.{name}: {error}") from error


class StudentTask:
    """A student under the engine, against its teachers' targets.

    Args:
        recipe: the run's.
        student: what the engine holds; asked for its description only.
        engine: trains it.
        targets: the teachers that are run, with their statistics.
    """

    def __init__(
        self, recipe: StudentRecipe, student: Student, engine: Engine, targets: Targets
    ) -> None:
        self.engine = engine
        self._targets = targets
        self._config, self._specs = student.config, student.targets
        self._licences = {name: licence_of(config) for name, config in recipe.teachers.items()}
        self._resolution, self._patch = recipe.largest_resolution, recipe.student.patch_size
        self._windows, self._seed = recipe.window_augmentation, recipe.run.seed
        self._equivariance, self._mesa = recipe.objective.equivariance, recipe.objective.mesa
        self._seen_by = _parts_of_arms(recipe, student.targets)
        self._objective, self._step = Objective(recipe.objective, targets.dispersions()), 0

    def loss(self, images: Tensor, part: Pass) -> LossTerms:
        """What the images (B, 3, H, W) in [0, 1] of a pass add to the step's loss."""
        if self.engine.steps != self._step:
            self._objective.finish_step()
            self._step = self.engine.steps
        generator = distributed.derived_generator("views")
        # Of all ranks' teachers, so that the draws do not depend on who runs which.
        readers = [*part.routes, *([mesa.READER] if self._mesa else [])]
        views = build_views(self._equivariance, images, self._patch, readers, generator)
        targets = self._targets(views.student, part.routes, views.of, part.keys)
        height, width = views.student.shape[-2:]
        grid = (height // self._patch, width // self._patch)
        window = draw_window(self._windows, grid, self._seed, self.engine.steps)
        output: StudentOutput = self.engine(views.student, window)
        terms = self._objective(output.heads, targets, part.shares, views.pairs)
        terms = terms._replace(metrics={**terms.metrics, **self._of_arms(terms, part)})
        if self._mesa is None or self.engine.steps < self._mesa.start_step:
            return terms
        average = self._average_map(views.of(mesa.READER))
        loss = part.share * mesa.mesa_loss(output.backbone.spatial, average, views.pairs)
        total = terms.total + self._mesa.weight * loss
        return terms._replace(total=total, parts={**terms.parts, "mesa": loss.detach()})

    def _average_map(self, images: Tensor) -> Tensor:
        """The backbone map of the averaged weights."""
        average, autocast = self.engine.averaged, self.engine.config.precision == "bf16"
        assert isinstance(average, Student)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return average.forward_intermediates(images, [len(average.trunk.blocks) - 1])[0]

    def _of_arms(self, terms: LossTerms, part: Pass) -> dict[str, Tensor]:
        """The same losses for each arm by itself: a mean over its own images."""
        none = torch.zeros((), device=terms.total.device)
        found = {}
        for arm, name in self._seen_by:
            value = none
            if arm == part.arm:
                value = terms.parts[name] * (part.arm_share / part.shares[name.split("/")[0]])
            found[f"loss/{arm}/{name}"] = value
        return found

    def save(self, folder: Path) -> None:
        """Writes the student as it would be exported, its targets' statistics and the state.

        Its metadata have every teacher's licence in words, and a fingerprint of the weights of
        those that are run.
        """
        weights = materialised(self.engine.weights())
        self._objective.finish_step()
        fingerprints: dict[str, str] = {}
        for each in distributed.gather_objects(self._targets.fingerprints()):
            fingerprints |= each
        if distributed.rank() == 0:
            save_student(
                folder / "student.safetensors",
                self._config,
                self._specs,
                weights,
                {
                    "licences": json.dumps(self._licences),
                    "fingerprints": json.dumps(fingerprints),
                },
            )
            self._targets.save(folder / "statistics")
            if state := self._objective.state():
                torch.save(state, folder / "objective.pt")

    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint's statistics, which stay as they are, and state."""
        self._targets.load(folder / "statistics")
        self._objective.dispersions = self._targets.dispersions()
        if self._objective.state():
            state = torch.load(folder / "objective.pt", map_location=distributed.device())
            self._objective.restore(state)

    def encoder(self) -> StudentEncoder:
        """A copy of the student as it would be exported now; every rank must call this.

        Its native resolution is the largest that the run trains at.
        """
        weights = materialised(self.engine.weights())
        student = student_of(self._config, self._specs, weights, "the run's student")
        return StudentEncoder(student.to(distributed.device()), resolution=self._resolution)

    def draw(self, images: Tensor, part: Pass, path: Path) -> None:
        """Draws PCA panels of the teachers and the student side by side."""
        from distill.display.pictures import draw_panels

        shown = central_crop(self._equivariance, images[:4], self._patch)
        self.engine.train(False)
        with torch.no_grad():
            output: StudentOutput = self.engine(shown)
        self.engine.train(True)
        # On every rank, as several may have to gather a teacher's weights together.
        targets = self._targets(shown, part.routes, keys=part.keys[: len(shown)])
        if distributed.rank() == 0:
            draw_panels(path, shown, targets, {"student": output})


def _parts_of_arms(
    recipe: StudentRecipe, specs: Mapping[str, FeatureSpec]
) -> list[tuple[str, str]]:
    """Each arm with the losses that count in it, `clip/summary`; none where there are no arms."""
    found = []
    for arm, config in recipe.arms.items():
        for name in config.teachers or recipe.teachers:
            weights = recipe.objective.weights_of(name)
            if weights.summary > 0 and specs[name].summary_dim is not None:
                found.append((arm, f"{name}/summary"))
            if weights.spatial > 0:
                found.append((arm, f"{name}/spatial"))
    return found
