"""The house's rules: who may import whom, what stays in one module, and no shadowed names."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "data": {"data"},
    "teachers": {"teachers"},
    "student": {"student", "teachers.features"},
    "distill": {"distill", "student", "teachers", "data"},
}
ONLY_IN = {
    "deepspeed": "distill/engine/deepspeed_library.py",
    "wandb": "distill/runtime/tracking.py",
    "ruamel": "distill/runtime/config.py",
}


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}" if node.module else ""


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    for path in _modules(package):
        for name in _imports(path):
            if name.partition(".")[0] not in ALLOWED:
                continue
            fits = any(name == a or name.startswith(f"{a}.") for a in ALLOWED[package])
            assert fits, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_one_module(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in _modules(package)
        if any(name.partition(".")[0] == library for name in _imports(path))
    }
    assert users == {ONLY_IN[library]}


def test_no_module_shadows_a_package_of_ours_or_of_the_standard_library() -> None:
    taken = set(ALLOWED) | set(sys.stdlib_module_names)
    for package in ALLOWED:
        for path in _modules(package):
            name = path.parent.name if path.stem == "__init__" else path.stem
            if path.parent != ROOT / package or path.stem != "__init__":
                assert name not in taken, f"{path.relative_to(ROOT)} shadows {name}"
