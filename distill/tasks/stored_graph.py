"""An exported ONNX graph of a student, as a teacher: `kind: onnx` in recipes.

It scores what is deployed, in its precision and by its runtime, on any benchmark.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import PositiveInt
from torch import Tensor

from distill.formats.onnx_agreement import open_session
from distill.formats.onnx_graph import IMAGES, large_weights, require_onnx
from distill.formats.onnx_metadata import read_metadata, spec_of
from distill.tasks.stored_student import licence_text
from teachers.features import Features
from teachers.teacher import Teacher, TeacherConfig


class StoredGraphConfig(TeacherConfig):
    """A graph of `distill.export --format onnx`.

    Attributes:
        path: its file.
        head: the teacher whose head is used; None for the backbone.
        resolution: (height, width) in pixels that a benchmark takes as the native one; None for
            the largest that the student trained at, by the file.
    """

    kind: str = "onnx"
    path: Path
    head: str | None = None
    resolution: tuple[PositiveInt, PositiveInt] | None = None

    def licence(self) -> str:
        """The licence of this code, and those of the teachers that the student learned from."""
        return licence_text(json.loads(read_metadata(self.path).get("teachers", "{}")))


class StoredGraph(Teacher):
    """A graph that onnxruntime runs, on a GPU where this onnxruntime has one."""

    Config: ClassVar[type[TeacherConfig]] = StoredGraphConfig
    wraps = True

    def __init__(self, config: StoredGraphConfig) -> None:
        require_onnx()
        import onnxruntime

        entries = read_metadata(config.path)
        spec = spec_of(entries, config.head, config.path, config.resolution)
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))  # the graph normalises
        own = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        available = onnxruntime.get_available_providers()
        self.digest = _digest(config.path)  # for the fingerprint
        self._run = _Session(open_session(config.path, [p for p in own if p in available]))
        prefix = "" if config.head is None else f"{config.head}_"
        parts = ("spatial",) if spec.summary_dim is None else ("spatial", "summary")
        self._outputs = [f"{prefix}{part}" for part in parts]

    @classmethod
    def from_config(cls, config: StoredGraphConfig) -> Self:
        """Opens the graph.

        Raises:
            RecipeError: there is no such file, it is no graph of a student, it has no such head, or
                onnxruntime is not installed.
        """
        return cls(config)

    def extract(self, images: Tensor) -> Features:
        """Runs the graph, which normalises the pixels itself; see `Teacher.extract`."""
        if images.is_meta:
            return self._shapes(images)
        found = self._run(self._outputs, images)
        spatial, *summary = (torch.from_numpy(each).to(images.device) for each in found)
        return Features(summary[0] if summary else None, spatial)

    def _shapes(self, images: Tensor) -> Features:
        batch, dim = images.shape[0], self.spec.summary_dim
        grid = self.spec.grid(*images.shape[2:])
        return Features(
            None if dim is None else images.new_empty(batch, dim),
            images.new_empty(batch, self.spec.spatial_dim, *grid),
        )


class _Session:
    """A session that copies of an encoder share, as it cannot be copied."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, names: list[str], images: Tensor) -> list[Any]:
        found: list[Any] = self._session.run(names, {IMAGES: images.float().cpu().numpy()})
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _digest(path: Path) -> str:
    """Of a graph and of the weights beside it."""
    digests = []
    for each in (path, large_weights(path)):
        if each.is_file():
            with each.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)
