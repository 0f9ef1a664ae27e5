"""A student as an ONNX graph in float32, for any batch, height and width.

The input `images` is float32 (B, 3, H, W) in [0, 1]. The outputs are `summary` and `spatial` of the
backbone, and `NAME_summary` and `NAME_spatial` of each head; a teacher without a summary has no
`NAME_summary`.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.runtime.errors import RecipeError
from student.model import Student

OPSETS = (17, 20)
IMAGES = "images"
_CHECKED = "images_of_whole_patches"


class Output(NamedTuple):
    """One output of a graph.

    Attributes:
        axes: their names, from the first.
        channels: the size of the second axis.
        head: the teacher whose head it is of; None for the backbone.
        pixels_per_cell: input pixels per cell of a map, along both axes; None for a summary.
    """

    axes: tuple[str, ...]
    channels: int
    head: str | None
    pixels_per_cell: float | None


class Outputs(nn.Module):
    """Returns the outputs of a student as one flat mapping, as ONNX graphs do."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encodes (B, 3, H, W) in [0, 1] into the named outputs."""
        backbone, heads = self.student(images)
        named = {"": backbone, **{f"{name}_": features for name, features in heads.items()}}
        return {
            f"{prefix}{kind}": value
            for prefix, features in named.items()
            for kind, value in features._asdict().items()
            if value is not None
        }


def example_of(student: Student) -> Tensor:
    """Images that show a student's shapes: two, of 3 x 4 cells."""
    p = student.spec.patch_size
    return torch.rand(2, 3, 3 * p, 4 * p)


@torch.no_grad()
def outputs_of(student: Student) -> dict[str, Output]:
    """What a student's graph returns, by name."""
    images = example_of(student)
    found: dict[str, Output] = {}
    for name, value in Outputs(student)(images).items():
        head = name.rpartition("_")[0] or None
        cells = value.shape[2] // 3 if value.ndim == 4 else None
        axes = ("batch", "channels", "rows", "columns")[: value.ndim]
        size = student.spec.patch_size / cells if cells else None
        found[name] = Output(axes, value.shape[1], head, size)
    return found


@torch.no_grad()
def write_graph(path: Path, student: Student, opset: int) -> None:
    """Writes the graph in float32; weights of more than 1.5 GiB go to `*.data` beside it.

    Args:
        path: the file to write.
        student: in float32 and eval mode.
        opset: one of `OPSETS`. The exporter writes 18 and later itself, and converts to 17.

    Raises:
        RecipeError: the extra `onnx` is not installed, or the graph cannot be converted to this
            opset.
    """
    require_onnx()
    import onnx

    p = student.spec.patch_size
    model, example = Outputs(student).eval(), example_of(student)
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # the exporter warns about internals of torch
        program = torch.onnx.export(
            model,
            (example,),
            input_names=[IMAGES],
            output_names=list(model(example)),
            dynamic_shapes={IMAGES: {0: batch, 2: p * rows, 3: p * columns}},
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    graph = onnx.load(path, load_external_data=False)
    if opset_of(graph) != opset:
        graph = _converted(path, graph, opset)
    for node in graph.graph.node:
        node.ClearField("metadata_props")  # it has paths of this machine
    _name_axes(graph.graph, outputs_of(student), p)
    _refuse_other_sizes(graph.graph, p)
    onnx.save(graph, path)


def _converted(path: Path, graph: Any, opset: int) -> Any:
    """A written graph in an older opset, where torch's exporter could not convert it.

    It hands onnx's converter a graph without its larger constants, and some operators need theirs,
    such as the axes of a mean.
    """
    from onnx import version_converter

    came = opset_of(graph)
    if large_weights(path).is_file():  # beyond what the converter takes
        raise RecipeError(f"--opset {opset}: the graph is too large to be converted from {came}")
    try:
        converted = version_converter.convert_version(graph, opset)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise RecipeError(
            f"--opset {opset}: the graph cannot be converted from {came} ({error})"
        ) from None
    for node in converted.graph.node:  # the converter leaves an attribute of 18, at its default
        kept = [each for each in node.attribute if each.name != "noop_with_empty_axes"]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    return converted


def large_weights(path: Path) -> Path:
    """The file for the weights of a graph that is too large for one file."""
    return path.with_name(f"{path.name}.data")


def require_onnx() -> None:
    """Raises a RecipeError that says what to install where a package of ONNX is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise RecipeError(
            f"--format onnx: {error.name} is missing; pip install 'featsharp-distill[onnx]'"
        ) from None


def opset_of(graph: Any) -> int:
    """The version of ONNX's own operators that a ModelProto uses."""
    return max(each.version for each in graph.opset_import if each.domain in ("", "ai.onnx"))


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keeps loggers silent: the exporter reports that it converts, and by which library."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _name_axes(graph: Any, outputs: dict[str, Output], patch_size: int) -> None:
    """Names the free axes of input and outputs; `2*rows` of a head that is twice as dense."""
    graph.ClearField("value_info")  # it has the exporter's own names
    height, width = graph.input[0].type.tensor_type.shape.dim[2:]
    height.dim_param, width.dim_param = "height", "width"
    for value in graph.output:
        output = outputs[value.name]
        if output.pixels_per_cell is not None:
            times = round(patch_size / output.pixels_per_cell)
            for dim, axis in zip(
                value.type.tensor_type.shape.dim[2:], output.axes[2:], strict=True
            ):
                dim.dim_param = axis if times == 1 else f"{times}*{axis}"


def _refuse_other_sizes(graph: Any, patch_size: int) -> None:
    """Makes a size that is no multiple of the patch an error that states the rule.

    ONNX has no assertion. But a reshape to more elements than there are fails in every runtime, and
    onnxruntime's message names the node, so the node's name is the sentence.
    """
    from numpy import array, int64
    from onnx import helper, numpy_helper

    for node in graph.node:
        if node.op_type != "Shape":  # which knows the names of the axes of the input only
            node.input[:] = [_CHECKED if name == IMAGES else name for name in node.input]
    sides = numpy_helper.from_array(array([1, 1, patch_size, patch_size], int64), "patch_sides")
    graph.initializer.append(sides)
    rule = f"the height and the width of `{IMAGES}` must be multiples of {patch_size} pixels"
    nodes = [
        helper.make_node("Shape", [IMAGES], ["images_shape"], name="images_shape"),
        helper.make_node(
            "Mod", ["images_shape", "patch_sides"], ["images_rest"], name="images_rest"
        ),
        helper.make_node("Add", ["images_shape", "images_rest"], ["images_due"], name="images_due"),
        helper.make_node("Reshape", [IMAGES, "images_due"], [_CHECKED], name=rule),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
