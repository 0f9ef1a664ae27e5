"""Weights and arithmetic of an ONNX graph in half precision, or in integers of eight bits.

float16: input, outputs and the normalisation of pixels stay float32, and so does the arithmetic of
Softmax and LayerNormalization, whose sums run over many values.

int8: onnxruntime's dynamic quantisation. The weights of all linears are stored as one byte with a
scale for each channel, and multiplied as integers with activations that are quantised as they come.
Weights are unsigned: signed ones, onnxruntime's default, saturate in the kernels of processors
without VNNI (up to 7 % off on such a one, where unsigned ones are 0.8 % off). Every other large
weight (position table, kernels of convolutions) is stored as one byte too, but computed with as
float32; and so are some linears where integers miss the bound, see `LEVELS`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from distill.formats.onnx_graph import IMAGES, quiet

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

# What multiplies integers in int8, from the fastest level to the most exact: after an activation a
# few large values take the range that all others need.
LEVELS = (
    "every linear",
    "the linears that do not follow an activation",
    "the linears that neither follow nor precede an activation",
    "no linear",
)

_IN_FLOAT32 = ("LayerNormalization", "Softmax")
_PIXELS = ("Reshape", "Sub", "Div", "Mul")  # what may come before the first layer
_ACTIVATIONS = {"Erf", "Gelu", "HardSwish", "Relu", "Sigmoid"}
_ELEMENTWISE = {"Add", "Clip", "Div", "Mul", *_ACTIVATIONS}
_LARGE = 1024  # values; smaller weights stay as they are
_ONE_FILE = 3 * 2**29  # bytes; protobuf's limit is 2 GiB, and torch's exporter stops here too


def convert(path: Path, out: Path, precision: Precision, level: int = 0) -> None:
    """Writes a graph of `write_graph` in another precision.

    Args:
        path: the graph in float32.
        out: the file to write, in a folder of its own; large weights go beside it.
        precision: `fp16` or `int8`.
        level: of `LEVELS`, what multiplies integers; int8 only.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = _halved(path) if precision == "fp16" else _quantised(path, level)
    ordered = ONNXModel(model)
    ordered.topological_sort()
    _save(onnx, ordered.model, out)


def _save(onnx: Any, model: Any, out: Path) -> None:
    size = sum(len(each.raw_data) for each in model.graph.initializer)
    if size > _ONE_FILE:
        options = {"location": f"{out.name}.data", "all_tensors_to_one_file": True}
        onnx.save(model, out, save_as_external_data=True, **options)
    else:
        onnx.save(model, out)


def _halved(path: Path) -> Any:
    """The graph in float16, with input and outputs in float32."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    graph = onnx.load(path, load_external_data=False).graph
    model = convert_float_to_float16(
        str(path),  # of a path shapes are inferred for more than 2 GiB too
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_IN_FLOAT32],
        node_block_list=list(_of_pixels(graph.node)),
    )
    model.graph.ClearField("value_info")
    _keep_float32(model.graph)
    return model


def _of_pixels(nodes: Iterable[Any]) -> Iterator[str]:
    """The names of the nodes that normalise pixels, before the first layer."""
    reached = {IMAGES}
    for node in nodes:
        if node.op_type in _PIXELS and node.input[0] in reached:
            reached.update(node.output)
            yield node.name


def _keep_float32(graph: Any) -> None:
    """Removes the rounding to float16 and back between nodes that both compute in float32."""
    casts = [node for node in graph.node if node.op_type == "Cast"]
    # The converter's own, by its names: another cast could be of integers.
    rounded = {
        node.output[0]: node.input[0]
        for node in casts
        if node.name.endswith("_cast_to_fp16_node") or node.input[0] == IMAGES
    }
    exact = {n.output[0]: rounded[n.input[0]] for n in casts if n.input[0] in rounded}
    for node in graph.node:
        known = rounded if node.op_type == "Shape" else exact
        node.input[:] = [known.get(name, name) for name in node.input]
    for outputs in (exact, rounded):  # the second lose their users with the first
        used = {name for node in graph.node for name in node.input}
        for node in [each for each in casts if each.output[0] in outputs]:
            if node.output[0] not in used:
                graph.node.remove(node)


def _quantised(path: Path, level: int) -> Any:
    """The graph with all large weights in bytes, and linears that compute with integers."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_name(f"integers_{path.name}")
    excluded = _in_float32(onnx.load(path, load_external_data=False).graph, level)
    with quiet(""):  # the root logger: it proposes what is done here already
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],
            use_external_data_format=True,
        )
    model = onnx.load(out)
    _store_as_bytes(model.graph)
    return model


def _in_float32(graph: Any, level: int) -> list[str]:
    """The names of the linears that do not multiply integers at a level."""
    before: dict[str, list[Any]] = {name: [node] for node in graph.node for name in node.output}
    after: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            after.setdefault(name, []).append(node)

    def beside(names: Iterable[str], links: Mapping[str, list[Any]], *, forward: bool) -> bool:
        """Whether an activation is the next that is no plain arithmetic."""
        waiting = [node for name in names for node in links.get(name, ())]
        while waiting:
            node = waiting.pop()
            if node.op_type in _ACTIVATIONS:
                return True
            if node.op_type in _ELEMENTWISE:
                further = node.output if forward else node.input
                waiting += [each for name in further for each in links.get(name, ())]
        return False

    found = []
    for node in graph.node:
        follows = beside(node.input[:1], before, forward=False)
        precedes = level > 1 and beside(node.output, after, forward=True)
        if level == len(LEVELS) - 1 or (level > 0 and follows) or precedes:
            found.append(node.name)
    return found


def _store_as_bytes(graph: Any) -> None:
    """Stores every large float32 weight as signed bytes with a scale for each channel."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    # The columns of a linear are its channels; of a kernel or a table the first axis.
    linears = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    large = [
        each
        for each in graph.initializer
        if each.data_type == TensorProto.FLOAT
        and len(each.dims) > 1
        and math.prod(each.dims) >= _LARGE
    ]
    for each in large:
        value, axis = numpy_helper.to_array(each), 1 if each.name in linears else 0
        others = tuple(i for i in range(value.ndim) if i != axis)
        scale = np.abs(value).max(axis=others, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1
        stored = np.rint(value / scale).astype(np.int8)
        names = [f"{each.name}_stored", f"{each.name}_stored_scale"]
        graph.initializer.remove(each)
        graph.initializer.append(numpy_helper.from_array(stored, names[0]))
        graph.initializer.append(numpy_helper.from_array(scale.reshape(-1), names[1]))
        node = helper.make_node("DequantizeLinear", names, [each.name], name=names[0], axis=axis)
        graph.node.insert(0, node)
