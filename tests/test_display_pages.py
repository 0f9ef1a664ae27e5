"""Templates: what is escaped, that no variable may be missing, and that wheels have them."""

import tomllib

import pytest
from jinja2 import UndefinedError

from distill.display import pages
from tests.tiny_run import REPOSITORY

FOLDER = REPOSITORY / "distill/display/templates"
PAGE = {
    "title": "a <b> & c",
    "retrained": [],
    "changes": None,
    "tables": [],
    "pictures": {},
    "protocols": {},
    "models": {"<i>": {"x": "'\"<"}},
}


def test_values_are_escaped_in_pages() -> None:
    page = pages.render("report.html.jinja", **PAGE)
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in page
    assert "<td>&#39;&#34;&lt;</td>" in page
    assert "<i>" not in page


def test_a_missing_variable_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'models' is undefined"):
        pages.render("report.html.jinja", **{k: v for k, v in PAGE.items() if k != "models"})


def test_wheels_have_every_template() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (pattern,) = project["tool"]["setuptools"]["package-data"]["distill.display"]
    assert set(FOLDER.parent.glob(pattern)) == set(FOLDER.iterdir())
