"""Registers kinds of teachers whose classes are on this floor, above their registry."""

from teachers.build import TEACHERS


def register_kinds() -> None:
    """Registers `kind: student`, a trained student as a teacher; may be called twice."""
    TEACHERS.register("student", "distill.tasks.stored_student:StoredStudent")
