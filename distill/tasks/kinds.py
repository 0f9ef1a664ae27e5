"""Kinds whose classes stand above their registry, entered when a command starts."""

from teachers.build import TEACHERS


def register_kinds() -> None:
    """Lets recipes name a trained student as a teacher, `kind: student`. May be called twice."""
    TEACHERS.register("student", "distill.tasks.stored_student:StoredStudent")
