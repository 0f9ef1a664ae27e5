"""Routes: at which size, and through which modules, a teacher makes a map for a student's grid.

`matched` runs the encoder at the size that gives the student's grid: student pixels x teacher
patch / student patch (RADIOv2.5). If the encoder does not take that size, its upsampler makes the
map denser (`upsampler`), several images share one canvas of its native size (`mosaic`), or both
maps are resized to the coarser of their grids (`interpolate`). Sizes alone decide; no weights are
needed.

The cells of a CNN that pads are not quite where an even division of the image has them (see
`FeatureSpec.frame`). `upsampler` and `interpolate` move them there. `matched` does not: a student's
cell learns the teacher's cell of the same number, up to half a cell away, because interpolating by
half a cell at the same grid makes each target the mean of its neighbours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from teachers.errors import TeacherError
from teachers.even_cells import even_encoder
from teachers.features import Features
from teachers.mosaic import Mosaic
from teachers.multi_scale import MultiScaleTeacher
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.resize import resize, scaled

RouteKind = Literal["matched", "upsampler", "mosaic", "interpolate"]
RouteChoice = Literal["auto", "matched", "upsampler", "mosaic", "interpolate"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Route:
    """How one teacher is run for one student size.

    Attributes:
        kind: of the route.
        input_size: (height, width) in pixels that images are resized to; of a mosaic, its canvas.
        grid: (h, w) cells of the map of one image; not the student's grid where maps are resized.
        forwards: encoder passes of one call, each at the encoder's resolution of that route.
        images: images that one call covers.
        mosaic: how images share a canvas; None for one image a call.
    """

    kind: RouteKind
    input_size: Size
    grid: Size
    forwards: int = 1
    images: int = 1
    mosaic: Mosaic | None = None

    def encode(self, teacher: Teacher, images: Tensor) -> Features:
        """Runs its teacher on images (B, 3, H, W) in [0, 1], at the student's size."""
        if self.mosaic is not None:
            return self.mosaic.encode(bare_encoder(teacher), images)
        encoder = teacher if self.kind == "upsampler" else bare_encoder(teacher)
        encode = even_encoder(encoder) if self.kind == "interpolate" else encoder
        return encode(resize(images, self.input_size))


def choose_route(
    teacher: Teacher, student: Size, patch: int, choice: RouteChoice = "auto"
) -> Route:
    """The route of a teacher to a student size.

    `auto` is `upsampler` if the teacher has one and its own map is coarser than the student's;
    else `matched` if the encoder takes the matched size; else `mosaic` if the teacher has neither
    upsampler nor summary, one size and room for two images; else `interpolate`. A list of
    upsamplers is always `upsampler`: it chooses one of them for each grid.

    Args:
        teacher: with its upsamplers; may be on the meta device.
        student: (height, width) of the student's images in pixels.
        patch: pixels of a cell of the student's map, or of the teacher's head where that is denser.
        choice: a route, or `auto`.

    Raises:
        TeacherError: the teacher has no such route to that size; names the reason and a cure.
    """
    grid = student[0] // patch, student[1] // patch
    kind = _automatic(teacher, grid) if choice == "auto" else choice
    try:
        if kind != "upsampler" and _changes_channels(teacher):
            raise TeacherError(
                f"no route {kind}: the teacher's upsampler makes {teacher.spec.spatial_dim} "
                f"channels of {bare_encoder(teacher).spec.spatial_dim}, and the student's head has "
                "one width at every size; take the route upsampler"
            )
        return _ROUTES[kind](teacher, grid)
    except TeacherError as error:
        raise TeacherError(
            f"students of {student[0]} x {student[1]} px have {error}"
            + (_cure(teacher, patch) if choice == "matched" else "")
        ) from error


def bare_encoder(teacher: Teacher) -> Teacher:
    """A teacher without its upsampler."""
    if isinstance(teacher, (UpsampledTeacher, MultiScaleTeacher)):
        return teacher.teacher
    return teacher


def _automatic(teacher: Teacher, grid: Size) -> RouteKind:
    if isinstance(teacher, MultiScaleTeacher):
        return "upsampler"
    encoder = bare_encoder(teacher)
    native = encoder.spec.grid(*encoder.spec.resolution)
    if isinstance(teacher, UpsampledTeacher):
        if not _covers(native, grid) or _changes_channels(teacher):
            return "upsampler"
        return "matched" if _takes(encoder, grid) else "interpolate"
    if _takes(encoder, grid):
        return "matched"
    room = (native[0] // grid[0]) * (native[1] // grid[1])
    alone = encoder.spec.summary_dim is None and not encoder.spec.any_resolution
    return "mosaic" if alone and room > 1 else "interpolate"


def _matched(teacher: Teacher, grid: Size) -> Route:
    encoder = bare_encoder(teacher)
    size = _matched_size(encoder, grid)
    if not _takes(encoder, grid):
        native, cells = encoder.spec.resolution, encoder.spec.grid(*encoder.spec.resolution)
        raise TeacherError(
            f"a grid of {grid[0]} x {grid[1]} cells, which is {size[0]} x {size[1]} px for this "
            f"teacher; it takes {native[0]} x {native[1]} px only, {cells[0]} x {cells[1]} cells"
        )
    return Route("matched", size, grid)


def _upsampler(teacher: Teacher, grid: Size) -> Route:
    if isinstance(teacher, MultiScaleTeacher):
        forwards = teacher.covering(grid).num_forwards
        return Route("upsampler", _matched_size(teacher, grid), grid, forwards)
    if not isinstance(teacher, UpsampledTeacher):
        raise TeacherError(
            f"a grid of {grid[0]} x {grid[1]} cells, and this teacher has no upsampler; name one "
            "in its entry, or take another route"
        )
    spec = teacher.spec
    forwards = teacher.upsampler.num_forwards
    return Route("upsampler", spec.resolution, spec.grid(*spec.resolution), forwards)


def _mosaic(teacher: Teacher, grid: Size) -> Route:
    spec = bare_encoder(teacher).spec
    try:
        mosaic = Mosaic.fit(spec, grid)
    except TeacherError as error:
        raise TeacherError(
            f"no room in {error}; take a smaller student, or the route interpolate"
        ) from error
    return Route("mosaic", spec.resolution, grid, 1, mosaic.num_images, mosaic)


def _interpolate(teacher: Teacher, grid: Size) -> Route:
    spec = bare_encoder(teacher).spec
    return Route("interpolate", spec.resolution, spec.grid(*spec.resolution))


_ROUTES: Mapping[RouteKind, Callable[[Teacher, Size], Route]] = {
    "matched": _matched,
    "upsampler": _upsampler,
    "mosaic": _mosaic,
    "interpolate": _interpolate,
}


def _changes_channels(teacher: Teacher) -> bool:
    return teacher.spec.spatial_dim != bare_encoder(teacher).spec.spatial_dim


def _matched_size(teacher: Teacher, grid: Size) -> Size:
    return scaled(grid, (teacher.spec.patch_size, teacher.spec.patch_size))


def _takes(encoder: Teacher, grid: Size) -> bool:
    size = _matched_size(encoder, grid)
    return encoder.spec.accepts(*size) and encoder.spec.grid(*size) == grid


def _covers(native: Size, grid: Size) -> bool:
    return native[0] >= grid[0] and native[1] >= grid[1]


def _cure(teacher: Teacher, patch: int) -> str:
    encoder = bare_encoder(teacher)
    height, width = scaled(encoder.spec.grid(*encoder.spec.resolution), (patch, patch))
    others = "interpolate" if encoder is teacher else "upsampler or interpolate"
    return f"; give the student {height} x {width} px, or take the route {others}"
