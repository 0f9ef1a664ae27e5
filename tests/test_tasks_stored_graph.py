"""An exported graph as an encoder of benchmarks: what onnxruntime returns, with the file's spec."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from distill.evaluation.models import model_of, parse_model
from distill.formats.onnx_metadata import FORMAT
from distill.runtime.errors import RecipeError
from distill.tasks.stored_graph import StoredGraph
from teachers.build import build_teacher
from teachers.fingerprint import teacher_fingerprint
from teachers.testing import check_teacher

ENTRIES: dict[str, Any] = {
    "format": FORMAT,
    "teachers": {"clip": "research only", "muted": None},
    "resolution": [8, 12],
    "outputs": {
        "summary": {"channels": 3, "head": None, "pixels_per_cell": None},
        "spatial": {"channels": 3, "head": None, "pixels_per_cell": 4.0},
        "clip_spatial": {"channels": 3, "head": "clip", "pixels_per_cell": 2.0},
        "odd_spatial": {"channels": 3, "head": "odd", "pixels_per_cell": 1.5},
    },
}


def write(path: Path, scale: float = 2.0, **entries: Any) -> Path:
    """A graph of mean colours, times `scale`, that says of itself what an exported one does."""
    pool = {"kernel_shape": [4, 4], "strides": [4, 4]}
    nodes = [
        helper.make_node("Mul", ["images", "scale"], ["x"], name="scale"),
        helper.make_node("AveragePool", ["x"], ["spatial"], name="pool", **pool),
        helper.make_node("ReduceMean", ["spatial", "axes"], ["summary"], name="mean", keepdims=0),
        helper.make_node(
            "AveragePool", ["x"], ["clip_spatial"], kernel_shape=[2, 2], strides=[2, 2]
        ),
    ]
    stored = [
        numpy_helper.from_array(np.float32(scale), "scale"),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]

    def value(name: str, *axes: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)

    outputs = [value("summary", "b", 3)]
    outputs += [value(name, "b", 3, "r", "c") for name in ("spatial", "clip_spatial")]
    graph = helper.make_graph(nodes, "g", [value("images", "b", 3, "h", "w")], outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (ENTRIES | entries).items()}
    helper.set_model_props(model, told)
    onnx.save(model, path)
    return path


def encoder(path: Path, **options: Any) -> StoredGraph:
    built = build_teacher(parse_model({"kind": "onnx", "path": str(path), **options}))
    assert isinstance(built, StoredGraph)
    return built


def test_it_returns_what_the_graph_does_of_the_images_as_they_are(tmp_path: Path) -> None:
    graph = encoder(write(tmp_path / "s.onnx"))
    images = torch.rand(2, 3, 8, 16)
    due = torch.nn.functional.avg_pool2d(2 * images, 4)
    came = graph(images)
    assert came.summary is not None
    torch.testing.assert_close(came.spatial, due)
    torch.testing.assert_close(came.summary, due.mean((2, 3)))
    assert (graph.spec.summary_dim, graph.spec.spatial_dim, graph.spec.patch_size) == (3, 3, 4)
    assert graph.spec.resolution == (8, 12)
    check_teacher(graph)


def test_a_head_has_its_own_cells_and_may_have_no_summary(tmp_path: Path) -> None:
    head = encoder(write(tmp_path / "s.onnx"), head="clip", resolution=[16, 16])
    images = torch.rand(1, 3, 4, 4)
    came = head(images)
    assert came.summary is None
    torch.testing.assert_close(came.spatial, torch.nn.functional.avg_pool2d(2 * images, 2))
    assert (head.spec.patch_size, head.spec.resolution) == (2, (16, 16))


def test_another_graph_is_another_encoder(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{scale}.onnx", scale) for scale in (2.0, 3.0))
    prints = [teacher_fingerprint(encoder(path).freeze()) for path in (one, one, other)]
    assert prints[0] == prints[1] != prints[2]


def test_shapes_alone_need_no_images(tmp_path: Path) -> None:
    meta = encoder(write(tmp_path / "s.onnx")).to("meta")
    came = meta(torch.empty(2, 3, 8, 16, device="meta"))
    assert came.summary is not None
    assert (tuple(came.summary.shape), tuple(came.spatial.shape)) == ((2, 3), (2, 3, 2, 4))


@pytest.mark.parametrize(
    ("options", "entries", "told"),
    [
        ({"head": "klip"}, {}, "no head 'klip' .did you mean 'clip'.*; there are clip, odd"),
        ({"head": "odd"}, {}, "cells of odd_spatial have 1.5 px; a cell must be a whole number"),
        ({}, {"format": "other"}, "its format is 'other', expected 'featsharp-distill onnx 1'"),
    ],
)
def test_what_a_graph_has_not_is_refused(
    tmp_path: Path, options: dict[str, Any], entries: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        encoder(write(tmp_path / "s.onnx", **entries), **options)


def test_files_that_are_no_graphs_are_told(tmp_path: Path) -> None:
    write(tmp_path / "student.onnx")
    with pytest.raises(RecipeError, match="there is no such file .did you mean 'student.onnx'"):
        encoder(tmp_path / "studnet.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(RecipeError, match="text.onnx: not an ONNX file"):
        encoder(tmp_path / "text.onnx")


def test_the_command_takes_a_graph_and_its_licence_is_known(tmp_path: Path) -> None:
    path = write(tmp_path / "s.onnx")
    config = parse_model(model_of(str(path)))
    assert config.licence() == "Apache-2.0; of its teachers: clip, research only"
