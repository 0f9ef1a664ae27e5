"""Tables before they are drawn, so that a screen and a page show the same."""

from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

_SCREEN = 80  # characters of a line; rich cuts words that do not fit


class Cell(NamedTuple):
    """A cell.

    Attributes:
        text: what it says.
        best: whether it is the best of its column.
    """

    text: str
    best: bool = False


class Sheet(NamedTuple):
    """A table.

    Attributes:
        title: what it is about.
        head: of the column of names, then of the others.
        lines: name and cells.
        note: what stands below.
    """

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, list[Cell]]]
    note: str = ""


def screen_table(sheet: Sheet) -> Table:
    """The sheet for a terminal, the best in bold; lines become columns where it is too wide."""
    grid = [[escape(head) for head in sheet.head]]
    for name, cells in sheet.lines:
        bold = (f"[bold]{escape(c.text)}[/bold]" if c.best else escape(c.text) for c in cells)
        grid.append([escape(name), *bold])
    plain = [list(sheet.head), *([name, *(c.text for c in cells)] for name, cells in sheet.lines)]
    width, turned = _width(plain), _width(_turned(plain))
    if width > _SCREEN and turned < width:
        grid = _turned(grid)
    table = Table(title=escape(sheet.title), caption=escape(sheet.note) or None)
    for number, head in enumerate(grid[0]):
        table.add_column(head, justify="right" if number else "left")
    for line in grid[1:]:
        table.add_row(*line)
    return table


def _turned(grid: list[list[str]]) -> list[list[str]]:
    return [list(line) for line in zip(*grid, strict=True)]


def _width(grid: list[list[str]]) -> int:
    """Characters of a line of the table; heads may break between words."""
    columns = (
        (max(map(len, head.split()), default=0), *map(len, cells)) for head, *cells in _turned(grid)
    )
    return 1 + sum(max(column) + 3 for column in columns)
