"""The table of every teacher's route in every arm, checked and shown before the first step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.runtime.errors import RecipeError
from distill.targets.routes import Route, Size, choose_route
from distill.tasks.student_recipe import StudentRecipe
from distill.training.arms import place_of
from distill.training.resolution import SizeConfig
from teachers.errors import TeacherError
from teachers.teacher import Teacher

_TITLES = (
    *("arm", "images a step", "student px", "cells"),
    *("teacher", "input px", "route", "grid", "forwards", "images a call"),
)


class RouteRow(NamedTuple):
    """One teacher at one student size of one arm.

    Attributes:
        arm: its name; empty where the recipe has no arms.
        batch_size: images of a step at this size, over all ranks.
        student: (height, width) of the student's images in pixels.
        student_grid: (h, w) cells of the student's map.
        head_grid: (h, w) cells that the route is chosen for: those of the teacher's head where a
            network of timm has heads that are denser than its map, else the student's.
        teacher: its name.
        route: by which the teacher is run.
    """

    arm: str
    batch_size: int
    student: Size
    student_grid: Size
    head_grid: Size
    teacher: str
    route: Route


def route_rows(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> list[RouteRow]:
    """A row for every teacher that any loss needs, at every size of every arm that it is in.

    Args:
        recipe: the student's.
        teachers: every teacher of the recipe by its name; they may be on the meta device.

    Raises:
        RecipeError: a teacher has no such route to a size; names the reason and a cure.
    """
    running = recipe.running(teachers)
    return [
        _row(recipe, arm, size, name, teachers[name])
        for arm, config in recipe.placed_arms.items()
        for size in config.resolution.root
        for name in config.teachers or recipe.teachers
        if name in running
    ]


def _row(
    recipe: StudentRecipe, arm: str, size: SizeConfig, name: str, teacher: Teacher
) -> RouteRow:
    config, patch = recipe.placed_arms[arm], recipe.student.patch_size
    choice = config.routes.get(name, "auto")
    try:
        cell = recipe.student.cell_size(name, teacher.spec)
        route = choose_route(teacher, size.size, cell, choice)
    except TeacherError as error:
        raise RecipeError(f"{_place(recipe, arm, name)}: {error}") from error
    summary = teacher.spec.summary_dim is not None and recipe.objective.weights_of(name).summary
    if route.mosaic is not None and summary:
        raise RecipeError(
            f"{_place(recipe, arm, name)}: a mosaic gives no summary of an image, which the "
            f"summary loss of {name} needs; set objective.weights.{name}.summary to 0, or take "
            "another route"
        )
    (height, width), images = size.size, size.batch_size or config.batch_size
    ours, of_head = ((height // cells, width // cells) for cells in (patch, cell))
    return RouteRow(arm, images, size.size, ours, of_head, name, route)


def _place(recipe: StudentRecipe, arm: str, teacher: str) -> str:
    """The key of the recipe that decides on the teacher's route; its entry if none does."""
    if arm and teacher in recipe.arms[arm].routes:
        return f"{place_of(arm)}.routes.{teacher}"
    return (
        f"targets.routes.{teacher}" if teacher in recipe.targets.routes else f"teachers.{teacher}"
    )


def route_table(rows: Sequence[RouteRow]) -> str:
    """Rows as aligned text.

    A grid that is not the student's is followed by the grid that both maps are resized to.
    """
    lines = [_TITLES, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_TITLES))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: RouteRow) -> tuple[str, ...]:
    route, ours = row.route, row.head_grid
    grid = _size(route.grid)
    if route.grid != ours:
        grid += f" on {min(ours[0], route.grid[0])} x {min(ours[1], route.grid[1])}"
    return (
        row.arm or "-",
        str(row.batch_size),
        _size(row.student),
        _size(row.student_grid),
        row.teacher,
        _size(route.input_size),
        route.kind,
        grid,
        str(route.forwards),
        str(route.images),
    )


def _size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
