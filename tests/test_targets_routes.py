"""Routes: what is chosen, what each costs, what comes back, and the words of each refusal."""

from typing import Any

import pytest
import torch

from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from distill.targets.ensemble import Ensemble
from distill.targets.routes import RouteChoice, choose_route
from distill.tasks.route_table import route_rows, route_table
from distill.tasks.student_recipe import StudentRecipe
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.multi_scale import MultiScaleTeacher
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.s2 import S2
from teachers.upsamplers.tile import Tile
from tests.doubles import Patches

Size = tuple[int, int]


def teacher(resolution: Size, patch: int, *, free: bool = False, summary: bool = True) -> Patches:
    spec = FeatureSpec(
        summary_dim=3 if summary else None,
        spatial_dim=5,
        patch_size=patch,
        resolution=resolution,
        any_resolution=free,
    )
    return Patches(spec)


def upsampled(factor: Size, *, free: bool = False) -> UpsampledTeacher:
    low = teacher((8, 12), 4, free=free)
    return UpsampledTeacher(low, Tile(low.spec, factor))


@pytest.mark.parametrize(
    ("student", "patch14", "patch16"),
    [(192, 168, 192), (256, 224, 256), (432, 378, 432), (512, 448, 512), (1152, 1008, 1152)],
)
def test_matched_sizes_are_the_published_ones(student: int, patch14: int, patch16: int) -> None:
    """Student pixels x teacher patch / student patch (RADIOv2.5, 2412.07679)."""
    for patch, due in ((14, patch14), (16, patch16)):
        free = teacher((patch, patch), patch, free=True)
        route = choose_route(free, (student, student), 16)
        assert (route.kind, route.input_size) == ("matched", (due, due))
        assert route.grid == (student // 16, student // 16)
    fixed = teacher((patch14, patch14), 14)
    assert choose_route(fixed, (student, student), 16).kind == "matched"


CASES = [
    # teacher, student px at patch 8, kind, input, grid, forwards, images a call
    (teacher((8, 12), 4, free=True), (32, 24), "matched", (16, 12), (4, 3), 1, 1),
    (teacher((8, 12), 4), (16, 24), "matched", (8, 12), (2, 3), 1, 1),
    (teacher((8, 12), 4), (32, 24), "interpolate", (8, 12), (2, 3), 1, 1),
    (teacher((32, 32), 4), (16, 24), "interpolate", (32, 32), (8, 8), 1, 1),
    (teacher((32, 32), 4, summary=False), (16, 24), "mosaic", (32, 32), (2, 3), 1, 8),
    (teacher((32, 32), 4, summary=False), (64, 64), "matched", (32, 32), (8, 8), 1, 1),
    (teacher((32, 32), 4, summary=False), (48, 40), "interpolate", (32, 32), (8, 8), 1, 1),
    (upsampled((2, 2)), (32, 48), "upsampler", (16, 24), (4, 6), 5, 1),
    (upsampled((2, 2)), (24, 24), "upsampler", (16, 24), (4, 6), 5, 1),
    (upsampled((2, 2)), (16, 24), "matched", (8, 12), (2, 3), 1, 1),
    (upsampled((2, 2)), (8, 16), "interpolate", (8, 12), (2, 3), 1, 1),
    (upsampled((2, 2), free=True), (8, 16), "matched", (4, 8), (1, 2), 1, 1),
    (upsampled((2, 2), free=True), (32, 32), "upsampler", (16, 24), (4, 6), 5, 1),
]


@pytest.mark.parametrize(("who", "student", "kind", "size", "grid", "forwards", "images"), CASES)
def test_the_route_that_is_chosen_by_itself(
    who: Teacher, student: Size, kind: str, size: Size, grid: Size, forwards: int, images: int
) -> None:
    route = choose_route(who, student, 8)
    assert (route.kind, route.input_size, route.grid) == (kind, size, grid)
    assert (route.forwards, route.images) == (forwards, images)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}-{case[1]}")
def test_no_pass_is_wasted_and_the_map_is_on_the_promised_grid(case: tuple[Any, ...]) -> None:
    """Of seven images: a pass each, one with each tile, or one a canvas."""
    who, student, _, _, grid, forwards, images = case
    encoder = who.teacher if isinstance(who, UpsampledTeacher) else who
    encoder.seen.clear()
    features = choose_route(who, student, 8).encode(who, torch.rand(7, 3, *student))
    assert features.spatial.shape == (7, 5, *grid)
    assert sum(count for count, *_ in encoder.seen) == -(-7 * forwards // images)


def test_a_list_of_upsamplers_gives_the_exact_grid_and_decides_alone() -> None:
    low = teacher((8, 12), 4)
    several = MultiScaleTeacher(low, [Tile(low.spec, (1, 1)), Tile(low.spec, (3, 3))])
    for student, forwards in (((16, 24), 1), ((24, 24), 10), ((48, 72), 10)):
        route = choose_route(several, student, 8)
        assert (route.kind, route.forwards) == ("upsampler", forwards)
        assert route.grid == (student[0] // 8, student[1] // 8)
        maps = route.encode(several, torch.rand(1, 3, *student)).spatial
        assert maps.shape[2:] == route.grid


def test_an_ensemble_takes_the_routes_of_an_arm_and_runs_its_teachers_only() -> None:
    one, other = teacher((32, 32), 4, summary=False), teacher((8, 12), 4)
    ensemble = Ensemble({"one": one, "other": other}, student_patch=8)
    images = torch.rand(4, 3, 16, 24)
    assert list(ensemble(images, {"one": "interpolate"})) == ["one"]
    assert one.seen == [(4, 32, 32)]
    assert other.seen == []
    assert list(ensemble(images)) == ["one", "other"]
    assert one.seen == [(4, 32, 32), (1, 32, 32)]
    assert ensemble(images, {"absent": "auto"}) == {}


@pytest.mark.parametrize(
    ("who", "student", "choice", "message"),
    [
        (
            teacher((8, 12), 4),
            (32, 48),
            "matched",
            "students of 32 x 48 px have a grid of 4 x 6 cells, which is 16 x 24 px for this "
            "teacher; it takes 8 x 12 px only, 2 x 3 cells; give the student 16 x 24 px, or take "
            "the route interpolate",
        ),
        (upsampled((2, 2)), (32, 48), "matched", "or take the route upsampler or interpolate"),
        (
            teacher((8, 12), 4),
            (32, 48),
            "upsampler",
            "a grid of 4 x 6 cells, and this teacher has no upsampler; name one in its entry",
        ),
        (
            teacher((32, 32), 4),
            (48, 48),
            "mosaic",
            "students of 48 x 48 px have no room in a mosaic: images of 6 x 6 cells on the "
            "encoder's grid of 8 x 8 give 1 x 1 per canvas; at least two must fit; take a smaller "
            "student, or the route interpolate",
        ),
    ],
)
def test_a_route_that_is_impossible_says_why_and_what_is_not(
    who: Teacher, student: Size, choice: RouteChoice, message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        choose_route(who, student, 8, choice)


def test_an_upsampler_that_changes_the_channels_runs_at_every_size() -> None:
    low = teacher((8, 12), 4)
    wide = UpsampledTeacher(low, S2(low.spec, (2, 2), beta=None))
    assert choose_route(wide, (16, 24), 8).kind == "upsampler"
    with pytest.raises(TeacherError, match="no route matched: .* 10 channels of 5, .* upsampler"):
        choose_route(wide, (16, 24), 8, "matched")


def _recipe(**sections: Any) -> StudentRecipe:
    tree = {
        "run": {"dir": "unused", "steps": 100},
        "data": {"sources": [{"shards": "unused"}]},
        "teachers": {
            "clip": {"kind": "dfn_clip", "model": "clip_ti16_128", "weights": "none"},
            "sam": {"kind": "dfn_clip", "model": "clip_ti16_128", "weights": "none"},
        },
        "arms": {
            "low": {"resolution": [{"size": 64}, {"size": [48, 64]}], "batch_size": 8},
            "high": {"resolution": 256, "batch_size": 4, "teachers": ["clip"]},
        },
        "student": {"size": "tiny"},
    }
    return validate(StudentRecipe, {**tree, **sections}, "recipe")


def _teachers() -> dict[str, Teacher]:
    clip = teacher((32, 32), 8, free=True)
    return {"clip": clip, "sam": teacher((64, 64), 8)}


WEIGHTS = {"sam": {"summary": 0}}


def test_the_table_shows_every_teacher_at_every_size_of_its_arms() -> None:
    recipe = _recipe(targets={"routes": {"sam": "mosaic"}}, objective={"weights": WEIGHTS})
    assert route_table(route_rows(recipe, _teachers())).splitlines() == [
        "arm   images a step  student px  cells    teacher  input px   route    grid     "
        "forwards  images a call",
        "low   8              64 x 64     4 x 4    clip     32 x 32    matched  4 x 4    "
        "1         1",
        "low   8              64 x 64     4 x 4    sam      64 x 64    mosaic   4 x 4    "
        "1         4",
        "low   8              48 x 64     3 x 4    clip     24 x 32    matched  3 x 4    "
        "1         1",
        "low   8              48 x 64     3 x 4    sam      64 x 64    mosaic   3 x 4    "
        "1         4",
        "high  4              256 x 256   16 x 16  clip     128 x 128  matched  16 x 16  "
        "1         1",
    ]


def test_a_grid_that_is_not_the_students_is_shown_with_the_common_one() -> None:
    recipe = _recipe(arms={}, run={"dir": "x", "steps": 100, "resolution": 80, "batch_size": 4})
    clip = teacher((64, 48), 8)
    rows = route_rows(recipe, {"clip": clip, "sam": clip})
    assert "-    4 " in (table := route_table(rows))
    assert "interpolate  8 x 6 on 5 x 5" in table


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"targets": {"routes": {"sam": "mosaic"}}},
            r"targets.routes.sam: a mosaic gives no summary .*; set objective.weights.sam.summary "
            "to 0, or take another route",
        ),
        (
            {"targets": {"routes": {"clip": "upsampler"}}},
            "targets.routes.clip: students of 64 x 64 px have .* no upsampler; name one",
        ),
    ],
)
def test_a_recipe_with_an_impossible_route_is_refused_by_its_path(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        route_rows(_recipe(**sections), _teachers())


def test_a_route_of_one_arm_is_refused_by_the_arms_path() -> None:
    arms = _recipe().model_dump(mode="json")["arms"]
    arms["high"]["routes"] = {"clip": "mosaic"}
    with pytest.raises(RecipeError, match=r"arms.high.routes.clip: students of 256 x 256 px have"):
        route_rows(_recipe(arms=arms), _teachers())


def test_teachers_without_a_loss_are_not_in_the_table() -> None:
    weights = {"sam": {"summary": 0, "spatial": 0}}
    rows = route_rows(_recipe(objective={"weights": weights}), _teachers())
    assert {row.teacher for row in rows} == {"clip"}
