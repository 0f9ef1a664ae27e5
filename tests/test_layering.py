"""The house's rules: who may import whom, what stays in one module, and no shadowed names.

A string that names a module (`"distill.benchmarks.dense.depth:Depth"`) counts as an import of it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "data": {"data"},
    "teachers": {"teachers", "data.files"},
    "student": {
        *("student", "data.files", "teachers.features", "teachers.files"),
        *("teachers.messages", "teachers.normalization"),
    },
    "distill": {"distill", "student", "teachers", "data"},
}
COMMANDS = (
    *("train_student", "train_upsampler", "write_targets"),
    *("evaluate", "plan", "export", "push", "visualize"),
)
FLOORS = {  # a folder of `distill` imports folders on lower floors only
    **dict.fromkeys(COMMANDS, 7),
    **{"evaluation": 6, "planning": 6},
    "tasks": 5,
    **{"benchmarks": 4, "training": 4, "formats": 4},
    "targets": 3,
    **{"objective": 2, "engine": 2, "parametrization": 2},
    **{"runtime": 1, "display": 1},
}
ONLY_IN = {
    "deepspeed": "distill/engine/deepspeed_library.py",
    "wandb": "distill/runtime/trackers.py",
    "mlflow": "distill/runtime/trackers.py",
    "ruamel": "distill/runtime/config.py",
}
_NAME = re.compile(rf"({'|'.join(ALLOWED)})(\.\w+)+(:\w+)?")


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def _house() -> dict[str, Path]:
    return {_dotted(path): path for package in ALLOWED for path in _modules(package)}


@cache
def _imports(path: Path) -> frozenset[str]:
    return frozenset(_names(ast.parse(path.read_text()), path))


def _names(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            inside = [name for name in inner if name in _house()]
            yield from inside
            if len(inside) < len(inner):  # `from distill.runtime import distributed` is no more
                yield module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if _NAME.fullmatch(node.value) and name in _house():
                yield name


def _room(module: str) -> str:
    """`runtime` of `distill.runtime.config`."""
    return module.split(".")[1]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    for path in _modules(package):
        for name in _imports(path):
            if name.partition(".")[0] not in ALLOWED:
                continue
            fits = any(name == a or name.startswith(f"{a}.") for a in ALLOWED[package])
            assert fits, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_of_distill_stands_on_a_floor() -> None:
    inside = [path for path in (ROOT / "distill").iterdir() if not path.name.startswith("_")]
    assert {path.stem for path in inside} == set(FLOORS)
    assert {path.stem for path in inside if path.is_file()} == set(COMMANDS)
    assert len(FLOORS) <= 20


def test_a_room_imports_lower_floors_only() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, path in _house().items()
        if module.startswith("distill.")
        for name in _imports(path)
        if name.startswith("distill.") and _room(name) != _room(module)
        if FLOORS[_room(name)] >= FLOORS[_room(module)]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {name for name in _imports(path) if name in _house() and name != module}
        for module, path in _house().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_one_module(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in _house().values()
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
