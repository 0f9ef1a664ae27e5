"""Names of any kind in tables, charts and pictures: each place has its own signs to escape."""

from rich.markup import escape

from data.text import shown

_LONGEST = 80  # characters


def table_text(name: object) -> str:
    """A name as rich's markup: `[red]` is shown, not obeyed."""
    return escape(shown(name, _LONGEST))


def chart_text(name: object) -> str:
    """A name as matplotlib's text: dollars begin no formula, an underscore hides no legend."""
    text = shown(name, _LONGEST).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def picture_text(name: object, longest: int = _LONGEST) -> str:
    """A name as one line that Pillow draws; signs that its font lacks are boxes."""
    return shown(name, longest)
