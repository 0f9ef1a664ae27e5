"""The program of torch.export: one file for every size, which torch loads without our code."""

import json
from pathlib import Path

import pytest
import torch

from distill.formats.export import export_student
from distill.formats.pt2 import METADATA
from tests.tiny_export import build, outputs, write_run

SIZES = [(2, 12, 20), (1, 24, 24), (3, 32, 8)]  # the table has 24 x 24 px


@pytest.mark.long
def test_a_program_is_saved_and_loaded_for_every_size(tmp_path: Path) -> None:
    student = build()
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    export_student(write_run(tmp_path, student), tmp_path / "s.pt2", format="pt2")
    facts = {METADATA: ""}
    model = torch.export.load(tmp_path / "s.pt2", extra_files=facts).module()
    assert json.loads(facts[METADATA])["outputs"]["clip_spatial"]["pixels_per_cell"] == 2
    for batch, height, width in SIZES:
        images = torch.rand(batch, 3, height, width)
        came, due = model(images), outputs(student, images)
        names = [name.replace("backbone/", "").replace("/", "_") for name in due]
        assert list(came) == names
        for name, value in zip(names, due.values(), strict=True):
            torch.testing.assert_close(came[name], value, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match=r"images.size\(\)\[3\] % 4 == 0"):
        model(torch.rand(1, 3, 12, 14))
    assert "torch.export.load('s.pt2').module()" in (tmp_path / "s.pt2.md").read_text()
