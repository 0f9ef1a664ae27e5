"""Overrides of a student's recipe, among them those that choose another kind of student."""

from collections.abc import Sequence
from typing import Any

from distill.runtime.config import apply_overrides
from student.config import StudentConfig
from student.timm_config import AnyStudentConfig, TimmStudentConfig
from teachers.messages import say_once

_KINDS: dict[str, type[AnyStudentConfig]] = {"vit": StudentConfig, "timm": TimmStudentConfig}
_KEY = "student.kind="


def override_student(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies overrides to the tree of a student's recipe, in place; see `apply_overrides`.

    Where `student.kind=...` chooses another kind than the recipe's, the keys of the recipe's
    `student` that only its own kind has are left out, which is said. Those of other overrides stay.

    Raises:
        RecipeError: see `apply_overrides`.
    """
    section = tree.get("student")
    chosen = [each.removeprefix(_KEY).strip() for each in overrides if each.startswith(_KEY)]
    if chosen and isinstance(section, dict):
        new, old = _KINDS.get(chosen[-1]), section.get("kind", "vit")
        if new is not None and old != chosen[-1]:
            foreign = [key for key in section if key not in new.model_fields]
            init = section.get("init")
            if isinstance(init, dict) and init.get("kind") == "timm":
                foreign.append("init")
            for key in foreign:
                del section[key]
            if foreign:
                say_once(
                    f"{_KEY}{chosen[-1]}: the recipe's {', '.join(foreign)} under student are left "
                    f"out, as only kind: {old} has them"
                )
    apply_overrides(tree, overrides)
