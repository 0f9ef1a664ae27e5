"""The paths that CONTRIBUTING names are there."""

import re
from pathlib import Path

from tests.tiny_run import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()


def test_every_path_that_contributing_names_exists() -> None:
    paths = [p for p in re.findall(r"`([\w./]+/[\w./]+)`", TEXT) if not p.startswith("tests/test_")]
    assert len(paths) > 10
    assert [path for path in paths if not Path(REPOSITORY, path).exists()] == []
