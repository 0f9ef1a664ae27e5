"""The README's own code, run as it stands."""

import re
from pathlib import Path

import pytest

from distill.formats.export import export_student
from distill.runtime.config import validate
from distill.tasks.student_recipe import StudentRecipe
from tests.tiny_run import REPOSITORY, plain_command, run, write_recipe

TEXT = (REPOSITORY / "README.md").read_text()


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    (block,) = [b for b in blocks if containing in b]
    return str(block)


def test_the_readme_is_short_and_starts_with_a_command() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 120
    assert any("make quickstart" in line for line in lines[:10])


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    from distill.runtime.config import load_yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(_block("yaml", "task: student"))
    validate(StudentRecipe, load_yaml(path), "README")


@pytest.mark.process
def test_a_teacher_of_at_most_20_lines_trains_a_student_that_loads(tmp_path: Path) -> None:
    teacher, loading = _block("python", "class ResNet"), _block("python", "student.load")
    assert len(teacher.strip().splitlines()) <= 20
    (tmp_path / "my_teacher.py").write_text(teacher)
    recipe = write_recipe(tmp_path, run={"steps": 2, "resolution": [32, 64]})
    text = recipe.read_text()
    start = text.index("teachers:")
    end = text.index("student:", start)
    entry = "teachers:\n  clip: {kind: 'my_teacher:ResNet'}\n"
    recipe.write_text(text[:start] + entry + text[end:])
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    export_student(tmp_path / "run", tmp_path / "student_hf", format="hf")
    script = tmp_path / "use.py"
    script.write_text(loading)
    used = run([plain_command(recipe)[0], str(script)], tmp_path)
    assert used.returncode == 0, used.stderr
    assert "torch.Size([1, 32, 32, 48]) torch.Size([1, 512, 32, 48])" in used.stdout
