"""Writes a student as a program of `torch.export`: `torch.export.load` reads it without our code.

It takes any batch, and sides of two patches and more; the outputs are a mapping with the names of
the ONNX graph. `program.module()` runs it, and AOTInductor compiles it.
"""

import json
from pathlib import Path

import torch

from data.files import atomic
from distill.formats.onnx_agreement import BOUNDS, expect, measure, missed
from distill.formats.onnx_graph import IMAGES, Outputs, example_of, outputs_of
from distill.runtime.errors import AgreementError
from student.storage import StudentFile, student_of

METADATA = "featsharp-distill.json"  # in the file: what `onnx_metadata` has under `outputs`, ...


@torch.no_grad()
def save_pt2(path: Path, file: StudentFile) -> None:
    """Writes a student in float32, after loading it again and comparing every output.

    Raises:
        AgreementError: an output differs.
    """
    student = student_of(file.config, file.targets, file.state_dict, "the student").float()
    model, p = Outputs(student).eval(), student.spec.patch_size
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    sizes = {IMAGES: {0: batch, 2: p * rows, 3: p * columns}}
    program = torch.export.export(model, (example_of(student),), dynamic_shapes=sizes)
    facts = {"patch_size": p, "outputs": {n: o._asdict() for n, o in outputs_of(student).items()}}
    with atomic(path) as partial:
        with partial.open("wb") as stream:  # of a name it would ask for the suffix .pt2
            torch.export.save(program, stream, extra_files={METADATA: json.dumps(facts)})
        with partial.open("rb") as stream:
            again = torch.export.load(stream).module()
        found = measure(again, expect(model, p))
        if (name := missed(found, BOUNDS["fp32"])) is not None:
            raise AgreementError(
                f"--format pt2: `{name}` of the program differs from the student's, relative "
                f"{found[name].relative:.3g}"
            )
