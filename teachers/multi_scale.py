"""A teacher with several upsamplers, which returns its map on the grid of any student.

The cheapest upsampler that covers the grid runs, and its map is resized to the grid, antialiased.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.even_cells import even_encoder
from teachers.features import Features
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize, scaled
from teachers.upsamplers.upsampler import Upsampler


class MultiScaleTeacher(Teacher):
    """An encoder at every multiple of its patch size, up to the largest factor of its upsamplers.

    The native resolution goes through the upsamplers too; list one of factor 1 to keep the
    encoder's own map there.

    Args:
        teacher: the encoder; it normalises the pixels and bounds its own batches.
        upsamplers: built for `teacher.spec`, of different factors.

    Raises:
        TeacherError: no upsampler, two of the same factor, or other channels than the encoder's.
    """

    fingerprinted_as = "teachers.matched.MatchedTeacher"
    wraps = True

    def __init__(self, teacher: Teacher, upsamplers: Sequence[Upsampler]) -> None:
        spec = replace(teacher.spec, any_resolution=True, native_grid=None, padding=None)
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        factors = [upsampler.factor for upsampler in upsamplers]
        if not factors or len(set(factors)) < len(factors):
            raise TeacherError(
                f"upsampler: expected a list of different factors, got {[list(f) for f in factors]}"
            )
        if any(u.spatial_dim != spec.spatial_dim for u in upsamplers):
            raise TeacherError("upsampler: those of a list must keep the encoder's channels")
        self.teacher = teacher
        by_cost = sorted(upsamplers, key=lambda u: (u.num_forwards, u.factor))
        self.upsamplers = nn.ModuleList(by_cost)

    def extract(self, images: Tensor) -> Features:
        """Upsamples images in [0, 1] to one cell per patch; see `Teacher.extract`.

        Raises:
            TeacherError: no upsampler covers the grid of these images.
        """
        grid = self.spec.grid(*images.shape[-2:])
        high = self.covering(grid)(images, even_encoder(self.teacher)).high
        return high._replace(spatial=resize(high.spatial, grid))

    def covering(self, grid: tuple[int, int]) -> Upsampler:
        """The cheapest upsampler whose map has at least `grid` (h, w) cells along both axes.

        Raises:
            TeacherError: there is none.
        """
        native = self.teacher.spec.grid(*self.teacher.spec.resolution)
        for upsampler in self.upsamplers:
            assert isinstance(upsampler, Upsampler)
            h, w = scaled(native, upsampler.factor)
            if h >= grid[0] and w >= grid[1]:
                return upsampler
        needed = [-(-grid[0] // native[0]), -(-grid[1] // native[1])]
        have = [list(u.factor) for u in self.upsamplers if isinstance(u, Upsampler)]
        raise TeacherError(
            f"a grid of {grid[0]} x {grid[1]} cells: the encoder's is {native[0]} x {native[1]}, "
            f"and its upsamplers have factors {have}; add one of {needed} or more"
        )
