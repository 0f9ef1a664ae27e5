"""The code of the teachers' page, run as it stands: a user's own teacher and upsampler."""

import json
import re
import sys
from pathlib import Path

import pytest

from student.storage import read_student
from teachers.build import TEACHERS
from teachers.upsamplers.trained import load_upsampler
from tests.tiny_run import REPOSITORY, plain_command, run, tiny_recipe, write_recipe

TEXT = (REPOSITORY / "teachers/README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    (found,) = [each for each in blocks if containing in each]
    return str(found)


def write_blocks(folder: Path) -> None:
    """Every Python file of the page, under the name in its first line."""
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        name = code.split("\n", 1)[0].removeprefix("# ")
        (folder / name).write_text(code)


@pytest.mark.process
def test_the_teacher_has_at_most_20_lines_and_keeps_the_contract(tmp_path: Path) -> None:
    code = block("python", "class Patches(")
    assert len([line for line in code.splitlines()[1:] if line.strip()]) <= 20
    write_blocks(tmp_path)
    done = run([sys.executable, "-m", "pytest", "-q", "test_my_teacher.py"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.process
def test_the_teacher_trains_a_student(tmp_path: Path) -> None:
    write_blocks(tmp_path)
    path = write_recipe(tmp_path, run={"steps": 2})
    text = path.read_text()
    start, end = text.index("teachers:"), text.index("student:", text.index("teachers:"))
    path.write_text(text[:start] + block("yaml", "teachers:") + text[end:])
    done = run(plain_command(path), tmp_path)
    assert done.returncode == 0, done.stderr
    licence = "not known here; read it where the weights came from"
    assert f"teacher patches: {licence}" in done.stderr
    kept = read_student(tmp_path / "run/checkpoints/step-00000002/student.safetensors").metadata
    assert json.loads(kept["licences"]) == {"patches": licence}
    assert len(json.loads(kept["fingerprints"])["patches"]) == 64


@pytest.mark.process
def test_the_upsampler_trains_and_its_file_loads(tmp_path: Path) -> None:
    write_blocks(tmp_path)
    tiny_recipe(tmp_path)  # writes the shards
    path = tmp_path / "sharpen.yaml"
    path.write_text(block("yaml", "task: upsampler"))
    shards = f"data.sources=[{{shards: {tmp_path / 'shards'}}}]"
    small = ["run.steps=2", "run.batch_size=2", "targets.statistics_images=4", "data.workers=0"]
    command = [sys.executable, "-m", "distill.train_upsampler", str(path), shards, *small]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs/sharpen/checkpoints/step-00000002/upsampler.safetensors"
    sys.path.append(str(tmp_path))
    assert "teacher: Apache-2.0" in done.stderr  # its licence
    try:
        card = load_upsampler(file).card
        assert card.upsampler["kind"] == "my_upsampler:Sharpen"
        assert card.facts["licence"] == "Apache-2.0"
        assert card.spec.spatial_from == "last block, after the final norm, before the projection"
    finally:
        sys.path.remove(str(tmp_path))


def test_every_built_in_kind_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == sorted(TEACHERS.table.keys() - {"pixels", "onnx"})  # for evaluations
