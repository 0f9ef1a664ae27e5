"""The teachers that this process runs: by which route, and where their weights wait.

They live here, outside the module that DeepSpeed trains, so that they never reach an optimiser or a
checkpoint. They are frozen, and their features are float32.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from distill.runtime import distributed, timing
from distill.targets.placement import Placement, place_teacher
from distill.targets.routes import Route, RouteChoice, Size, choose_route
from teachers.features import Features
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize


class Ensemble:
    """Frozen teachers, by name.

    Args:
        teachers: name to teacher, those that this rank runs.
        student_patch: pixels of a cell of the student's maps, which decides on routes: one number,
            or that of each teacher's head; None without a student, where each teacher runs at its
            native resolution.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], student_patch: int | Mapping[str, int] | None
    ) -> None:
        self.teachers = dict(teachers)
        self.student_patch = student_patch
        self._fingerprints: dict[str, str] = {}
        self._routes: dict[tuple[str, Size, RouteChoice], Route] = {}

    def fingerprints(self) -> dict[str, str]:
        """Teacher name to `teacher_fingerprint`, which is computed once."""
        for name, teacher in self.teachers.items():
            if name not in self._fingerprints:
                self._fingerprints[name] = teacher_fingerprint(teacher)
        return dict(self._fingerprints)

    def place(self, placement: Mapping[str, Placement], peers: distributed.Peers) -> None:
        """Moves teachers from host memory to their `placement`; `peers` run the same arms."""
        self.fingerprints()  # while the weights are whole
        for name, where in placement.items():
            if name in self.teachers:
                place_teacher(self.teachers[name], where, peers)

    def route(self, name: str, size: Size, choice: RouteChoice) -> Route:
        """The route of a teacher to a student size (height, width) in pixels."""
        patch = self.student_patch
        assert patch is not None
        key = name, size, choice
        if key not in self._routes:
            cell = patch if isinstance(patch, int) else patch[name]
            self._routes[key] = choose_route(self.teachers[name], size, cell, choice)
        return self._routes[key]

    def __call__(
        self,
        images: Tensor,
        routes: Mapping[str, RouteChoice] | None = None,
        view: Callable[[str], Tensor] | None = None,
    ) -> dict[str, Features]:
        """The features of each teacher.

        Args:
            images: (B, 3, H, W) in [0, 1], at the student's size if there is a student.
            routes: teacher name to route, of the teachers to run; None runs all, by `auto`.
            view: gives the images that a teacher sees, by its name; None: `images`.
        """
        if routes is None:
            routes = dict.fromkeys(self.teachers, "auto")
        return {
            name: self._encode(name, view(name) if view else images, choice)
            for name, choice in routes.items()
            if name in self.teachers
        }

    def _encode(self, name: str, images: Tensor, choice: RouteChoice) -> Features:
        teacher = self.teachers[name]
        with timing.timed(f"teacher/{name}"):
            if self.student_patch is None:
                return teacher(resize(images, teacher.spec.resolution))
            size = (images.shape[-2], images.shape[-1])
            return self.route(name, size, choice).encode(teacher, images)
