"""Writes a student as an ONNX file: in a precision, compared with PyTorch, saying what it is.

A graph takes any batch, height and width, see `onnx_graph`; a height or width that is no multiple
of the patch size fails with a message that says so.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from distill.formats.onnx_agreement import BOUNDS, Agreement, Expected, compare, expect, missed
from distill.formats.onnx_graph import OPSETS, Outputs, large_weights, outputs_of, write_graph
from distill.formats.onnx_metadata import describe, write_metadata
from distill.formats.onnx_precision import LEVELS, PRECISIONS, Precision, convert
from distill.runtime.errors import AgreementError
from student.storage import StudentFile, student_of

DEFAULT_OPSET = OPSETS[-1]


class OnnxOptions(NamedTuple):
    """How a graph is written.

    Attributes:
        precision: see `onnx_precision`.
        opset: one of `OPSETS`.
    """

    precision: Precision = PRECISIONS[0]
    opset: int = DEFAULT_OPSET


PLAIN = OnnxOptions()


def save_onnx(path: Path, file: StudentFile, options: OnnxOptions = PLAIN) -> Agreement:
    """Writes a student, after comparing every output with PyTorch in float32.

    Args:
        path: the file to write; weights of more than 1.5 GiB go to `*.data` beside it.
        file: the student.
        options: how.

    Returns:
        The differences; they are in the file's metadata too.

    Raises:
        RecipeError: the extra `onnx` is not installed, or the opset is too old for the graph.
        AgreementError: an output misses the bound of its precision, see `onnx_agreement.BOUNDS`.
    """
    student = student_of(file.config, file.targets, file.state_dict, "the student").float()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        graph, converted = (
            Path(folder) / name / path.name for name in (PRECISIONS[0], options.precision)
        )
        graph.parent.mkdir()
        write_graph(graph, student, options.opset)
        expected = expect(Outputs(student), student.spec.patch_size)
        agreement = _agree(graph, converted, options, expected, student.spec.patch_size)
        write_metadata(converted, describe(student, file, outputs_of(student), agreement))
        large_weights(path).unlink(missing_ok=True)  # of a larger graph that is replaced
        # The graph after its weights.
        for each in sorted(converted.parent.glob(f"{path.name}*"), reverse=True):
            each.replace(path.parent / each.name)
    return agreement


def _agree(
    graph: Path, converted: Path, options: OnnxOptions, expected: list[Expected], patch_size: int
) -> Agreement:
    """Converts a graph; fewer linears multiply integers where the bound is missed otherwise."""
    precision, opset = options
    bound = BOUNDS[precision]
    converted.parent.mkdir(exist_ok=True)
    for level in range(len(LEVELS) if precision == "int8" else 1):
        if precision != "fp32":
            convert(graph, converted, precision, level)
        found = compare(converted, expected)
        if missed(found, bound) is None:
            return Agreement(precision, opset, level, found, patch_size)
    name = missed(found, bound)
    assert name is not None
    came = getattr(found[name], bound.figure)
    another = "" if precision == "fp32" else "; --precision fp32 is exact"
    raise AgreementError(
        f"--precision {precision}: `{name}` of the graph differs from PyTorch's, {bound.figure} "
        f"{came:.6g}; bound: {bound.text}{another}"
    )
