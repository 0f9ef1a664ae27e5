"""The loop's task for a student: from images to the loss, and the student's checkpoint files."""

import json
from pathlib import Path

import torch
from torch import Tensor

from distill.engine.engine import Engine
from distill.objective import mesa
from distill.objective.objective import LossTerms, Objective
from distill.objective.views import build_views, central_crop
from distill.parametrization.reparametrize import plain_weights
from distill.runtime import distributed
from distill.targets.source import TargetSource
from distill.tasks.build import fingerprints_of
from distill.tasks.student_encoder import StudentEncoder
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.window_augmentation import draw_window
from distill.training.arms import MicroBatch
from student.model import Student, StudentOutput
from student.storage import save_student, student_of
from teachers.catalog import licence_of


class StudentTask:
    """Trains a student, which the engine holds, on its teachers' targets with their statistics.

    Only the configuration of the student is read.
    """

    def __init__(
        self, recipe: StudentRecipe, student: Student, engine: Engine, targets: TargetSource
    ) -> None:
        self.engine = engine
        self._targets = targets
        self._config, self._specs = student.config, student.targets
        self._licences = {name: licence_of(config) for name, config in recipe.teachers.items()}
        self._resolution, self._patch = recipe.largest_resolution, recipe.student.patch_size
        self._windows, self._seed = recipe.window_augmentation, recipe.run.seed
        self._equivariance, self._mesa = recipe.objective.equivariance, recipe.objective.mesa
        self._losses_of_arms = [
            (arm, loss)
            for arm, config in recipe.arms.items()
            for teacher in config.teachers or recipe.teachers
            for loss in recipe.objective.losses_of(teacher, student.targets[teacher])
        ]
        self._objective = Objective(recipe.objective, targets.statistics.dispersions())
        self._step = 0

    def loss(self, images: Tensor, micro_batch: MicroBatch) -> LossTerms:
        """What a micro-batch of images (B, 3, H, W) in [0, 1] adds to the step's loss."""
        if self.engine.steps != self._step:
            self._objective.finish_step()
            self._step = self.engine.steps
        generator = distributed.derived_generator("views")
        # All teachers of the arm, so that draws do not depend on which of them this rank runs.
        consumers = [*micro_batch.routes, *([mesa.EMA] if self._mesa else [])]
        views = build_views(self._equivariance, images, self._patch, consumers, generator)
        targets = self._targets(views.student, micro_batch.routes, views.of, micro_batch.keys)
        height, width = views.student.shape[-2:]
        grid = (height // self._patch, width // self._patch)
        window = draw_window(self._windows, grid, self._seed, self.engine.steps)
        output: StudentOutput = self.engine(views.student, window)
        terms = self._objective(output.heads, targets, micro_batch.shares, views.pairs)
        terms = terms._replace(metrics={**terms.metrics, **self._of_arms(terms, micro_batch)})
        if self._mesa is None or self.engine.steps < self._mesa.start_step:
            return terms
        average = self._average_map(views.of(mesa.EMA))
        loss = micro_batch.share * mesa.mesa_loss(output.backbone.spatial, average, views.pairs)
        total = terms.total + self._mesa.weight * loss
        return terms._replace(total=total, losses={**terms.losses, "mesa": loss.detach()})

    def _average_map(self, images: Tensor) -> Tensor:
        """The backbone map of the averaged weights."""
        average, autocast = self.engine.averaged, self.engine.config.precision == "bf16"
        assert isinstance(average, Student)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return average.forward_intermediates(images, [average.trunk.map_index])[0]

    def _of_arms(self, terms: LossTerms, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """The same losses for each arm alone: means over its own images."""
        zero = torch.zeros((), device=terms.total.device)
        found = {}
        for arm, name in self._losses_of_arms:
            value = zero
            if arm == micro_batch.arm:
                share = micro_batch.shares[name.split("/")[0]]
                value = terms.losses[name] * (micro_batch.arm_share / share)
            found[f"loss/{arm}/{name}"] = value
        return found

    def save(self, folder: Path) -> None:
        """Writes the student as exported, its targets' statistics and the objective's state.

        The student's metadata hold every teacher's licence, and the fingerprints of the teachers
        that are run.
        """
        weights = plain_weights(self.engine.weights())
        self._objective.finish_step()
        fingerprints = fingerprints_of(self._targets)
        if distributed.rank() == 0:
            facts: dict[str, object] = {"licences": self._licences, "fingerprints": fingerprints}
            facts["resolution"] = self._resolution
            metadata = {name: json.dumps(value) for name, value in facts.items()}
            path = folder / "student.safetensors"
            save_student(path, self._config, self._specs, weights, metadata)
            self._targets.statistics.save(folder / "statistics")
            if state := self._objective.state():
                torch.save(state, folder / "objective.pt")

    def load(self, folder: Path) -> None:
        """Restores a checkpoint's statistics and the objective's state."""
        statistics = self._targets.statistics
        statistics.load(folder / "statistics", list(statistics.of))
        self._objective.dispersions = statistics.dispersions()
        if self._objective.state():
            state = torch.load(folder / "objective.pt", map_location=distributed.device())
            self._objective.restore(state)

    def encoder(self) -> StudentEncoder:
        """A copy of the student as exported now, at the run's largest size; all ranks call this."""
        weights = plain_weights(self.engine.weights())
        student = student_of(self._config, self._specs, weights, "the run's student")
        return StudentEncoder(student.to(distributed.device()), resolution=self._resolution)

    def draw(self, images: Tensor, micro_batch: MicroBatch, path: Path) -> None:
        """Draws PCA panels of the teachers and the student side by side."""
        from distill.display.pictures import draw_panels

        shown = central_crop(self._equivariance, images[:4], self._patch)
        self.engine.train(False)
        with torch.no_grad():
            output: StudentOutput = self.engine(shown)
        self.engine.train(True)
        # On every rank, because a sharded teacher's weights are gathered from all of its ranks.
        targets = self._targets(shown, micro_batch.routes, keys=micro_batch.keys[: len(shown)])
        if distributed.rank() == 0:
            draw_panels(path, shown, targets, {"student": output})
