"""Tables of text, printed to a terminal by `Table.to_rich` and put on a page by a template."""

from typing import NamedTuple

import rich.table
from rich.markup import escape

from data.text import printable
from distill.display.text import table_text

_TERMINAL_WIDTH = 80  # characters; rich cuts words in a wider table


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: its content.
        best: whether it is the best of its column; shown in bold.
    """

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table whose first column names the rows.

    Attributes:
        title: shown above the table.
        columns: headings, the first of the column of names.
        rows: the name and the other cells of each row.
        note: shown below the table; empty for none.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]
    note: str = ""

    def to_rich(self) -> rich.table.Table:
        """The table for a terminal; transposed if it is too wide and narrower that way."""
        grid = [[table_text(name) for name in self.columns]]
        plain = [list(self.columns)]
        for name, cells in self.rows:
            texts = [table_text(cell.text) for cell in cells]
            bold = (f"[bold]{t}[/bold]" if c.best else t for t, c in zip(texts, cells, strict=True))
            grid.append([table_text(name), *bold])
            plain.append([name, *(cell.text for cell in cells)])
        width = _width(plain)
        if width > _TERMINAL_WIDTH and _width(_transposed(plain)) < width:
            grid = _transposed(grid)
        table = rich.table.Table(
            title=table_text(self.title), caption=escape(printable(self.note)) or None
        )
        for number, name in enumerate(grid[0]):
            table.add_column(name, justify="right" if number else "left")
        for row in grid[1:]:
            table.add_row(*row)
        return table


def _transposed(grid: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*grid, strict=True)]


def _width(grid: list[list[str]]) -> int:
    """Characters of one line of the printed table; headings may break between words."""
    columns = (
        (max(map(len, name.split()), default=0), *map(len, cells))
        for name, *cells in _transposed(grid)
    )
    return 1 + sum(max(column) + 3 for column in columns)
