"""Registers kinds of teachers whose classes are on this floor, above their registry."""

from teachers.build import TEACHERS


def register_kinds() -> None:
    """Registers a trained student as a teacher, `student`, and its graph, `onnx`.

    It may be called twice.
    """
    TEACHERS.register("student", "distill.tasks.stored_student:StoredStudent")
    TEACHERS.register("onnx", "distill.tasks.stored_graph:StoredGraph")
