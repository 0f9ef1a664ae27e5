"""A registry: finds a class by the `kind` of a recipe entry, and validates the entry.

A kind is a built-in name or an import path `package.module:Class`. Built-in classes are named by
strings, so that a recipe imports only the libraries that it uses.
"""

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ValidationError

from teachers.errors import TeacherError
from teachers.messages import did_you_mean
from teachers.validation import explain


@dataclass(frozen=True)
class Registry:
    """The classes that one kind of recipe entry may name.

    Attributes:
        noun: for messages, `teacher`.
        table: built-in kinds to `module:Class`; `register` adds to it.
        base: the class that users' own classes must derive from.
        config: the class that their `Config` must derive from.
    """

    noun: str
    table: dict[str, str]
    base: type
    config: type[BaseModel]

    def register(self, kind: str, path: str) -> None:
        """Adds a built-in kind by the path `module:Class` of a class on an upper floor.

        Raises:
            ValueError: the kind is taken by another class.
        """
        if self.table.setdefault(kind, path) != path:
            raise ValueError(f"{self.noun} kind {kind!r} is already {self.table[kind]}")

    def is_built_in(self, kind: str) -> bool:
        """Whether a kind is tested here, and not a user's class."""
        return kind in self.table

    def resolve(self, kind: str) -> Any:
        """The class that `kind` names.

        Raises:
            TeacherError: there is no such class, or it is incomplete.
        """
        path = self.table.get(kind, kind)
        module_name, _, class_name = path.partition(":")
        if not (module_name and class_name):
            raise TeacherError(
                f"kind: {kind!r} is unknown{did_you_mean(kind, self.table)}; choose one of "
                f"{sorted(self.table)}, or the import path of your own {self.noun}, "
                "package.module:Class"
            )
        module = _import(module_name, kind)
        if not hasattr(module, class_name):
            classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
            raise TeacherError(
                f"kind: {kind!r}: {module.__file__} has no class {class_name!r}"
                f"{did_you_mean(class_name, classes)}"
            )
        found = getattr(module, class_name)
        self._check(found, kind)
        return found

    def _check(self, found: Any, kind: str) -> None:
        base = f"{self.base.__module__}.{self.base.__name__}"
        if not (inspect.isclass(found) and issubclass(found, self.base)):
            raise TeacherError(f"kind: {kind!r} is not a subclass of {base}")
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise TeacherError(
                f"kind: {kind!r} lacks what every {self.noun} must implement: {', '.join(missing)}"
            )
        config = getattr(found, "Config", None)
        if not (inspect.isclass(config) and issubclass(config, self.config)):
            raise TeacherError(
                f"kind: {kind!r}: its Config must be a subclass of "
                f"{self.config.__module__}.{self.config.__name__}, not {config!r}"
            )

    def parse(self, value: Any) -> Any:
        """Validates a recipe entry with the `Config` of the class that its `kind` names.

        Args:
            value: a mapping with a `kind`, or a config, which is returned as it is.

        Raises:
            TeacherError: no such kind, or wrong keys or values; lists all of them.
        """
        if isinstance(value, self.config):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise TeacherError(
                f"expected a {self.noun}: a mapping with a kind, one of {sorted(self.table)} or "
                f"package.module:Class; got {value!r}"
            )
        config = self.resolve(value["kind"]).Config
        try:
            return config.model_validate(dict(value))
        except ValidationError as error:
            raise TeacherError("; ".join(explain(error, config))) from None


def _import(module_name: str, kind: str) -> Any:
    """Imports a module; the current directory is searched too, last."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise TeacherError(
                f"kind: {kind!r}: no module {error.name!r} in {os.getcwd()} or on the import path"
            ) from None
        raise TeacherError(f"kind: {kind!r}: {module_name} cannot be imported: {error}") from error
