"""Fills the templates of pages and model cards, which are in `templates/` beside this module."""

import base64
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from data.text import printable, shown

_ENVIRONMENT = Environment(
    loader=PackageLoader("distill.display"),
    autoescape=select_autoescape(["html.jinja"], default=False),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    # Markup, of a type of its own, is finished.
    finalize=lambda value: printable(value) if type(value) is str else value,
)
_ENVIRONMENT.filters["shown"] = shown
_ENVIRONMENT.filters["base64"] = lambda content: base64.b64encode(content).decode()


class Picture(NamedTuple):
    """A picture that a page embeds.

    Attributes:
        png: content of the PNG file.
        description: alternative text.
        caption: shown above the picture; empty for none.
    """

    png: bytes
    description: str
    caption: str = ""


def render(template: str, **values: Any) -> str:
    """Renders a page or a card.

    Args:
        template: name of a file in `templates/`; values are escaped in `*.html.jinja` only.
        values: the template's variables, all of them.

    Raises:
        jinja2.UndefinedError: the template uses a variable that is not in `values`.
    """
    return _ENVIRONMENT.get_template(template).render(values)
