"""The code of the evaluation page, run as it stands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.benchmarks.build import BENCHMARKS
from distill.evaluate import parse_arguments
from distill.evaluation.results import ReportRecipe
from distill.evaluation.suite import SuiteRecipe
from distill.runtime.config import apply_overrides, dump_yaml, load_yaml, validate
from tests.tiny_run import REPOSITORY, run, write_images

TEXT = (REPOSITORY / "recipes/evaluation/README.md").read_text()


@pytest.mark.process
def test_a_benchmark_of_ones_own_in_about_30_lines_runs_from_outside(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "my_benchmark.py").write_text(code)
    write_images(tmp_path / "images", 5)
    suite = {
        "task": "benchmarks",
        "dir": "results",
        "models": {"colours": {"kind": "pixels", "resolution": [32, 32]}},
        "benchmarks": {"mirrored": {"kind": "my_benchmark:MirroredCopies", "images": "images"}},
    }
    (tmp_path / "suite.yaml").write_text(dump_yaml(suite))
    done = run([sys.executable, "-m", "distill.evaluate", "suite.yaml"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recall" in done.stdout
    assert (tmp_path / "results/results.jsonl").is_file()


@pytest.mark.process
def test_two_ranks_give_one_file_with_the_figures_of_one(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        write_images(tmp_path / "set/images" / part, 3, (16, 16))
        labels = tmp_path / "set/annotations" / part
        labels.mkdir(parents=True)
        for i in range(3):
            array = np.random.default_rng(i).integers(0, 2, (16, 16), dtype=np.uint8)
            Image.fromarray(array).save(labels / f"{i}.png")
    suite = {
        "task": "benchmarks",
        "dir": "results",
        "models": {"colours": {"kind": "pixels", "patch_size": 4, "resolution": [16, 16]}},
        "benchmarks": {
            "halves": {
                "kind": "segmentation",
                "dataset": {"kind": "folder", "root": "set", "classes": ["a", "b"]},
                "probe": {"steps": 3, "batch_size": 3, "lr": 0.01},
            }
        },
    }
    (tmp_path / "suite.yaml").write_text(dump_yaml(suite))
    for ranks, out in ((2, "two"), (1, "one")):
        command = [sys.executable, "-m", "distill.evaluate", "suite.yaml", f"dir={out}"]
        done = run(command, tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("miou") == 1
    one, two = (json.loads((tmp_path / n / "results.jsonl").read_text()) for n in ("one", "two"))
    assert one["figures"] == two["figures"]
    assert not list((tmp_path / "two").glob(".meeting*"))


def commands() -> list[list[str]]:
    """The page's commands as a shell passes them on."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
    script = re.sub(r"python -m |deepspeed --num_gpus \d+ --module ", "show ", script)
    show = "show() { printf '%s\\t' \"$@\"; echo; }\n"
    done = subprocess.run(["bash", "-c", show + script], capture_output=True, text=True, check=True)
    lines = [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]
    return [line for line in lines if line[0] == "distill.evaluate"]


@pytest.mark.process
def test_the_page_has_a_valid_command_for_every_kind_of_benchmark() -> None:
    kinds = set()
    for _, *arguments in commands():
        parsed = parse_arguments(arguments)
        path = parsed.on or Path(parsed.target)
        tree = load_yaml(REPOSITORY / path)
        apply_overrides(tree, parsed.overrides)
        if tree["task"] == "benchmarks":
            recipe = validate(SuiteRecipe, tree, str(arguments))
            kinds |= {benchmark.kind for benchmark in recipe.benchmarks.values()}
        else:
            validate(ReportRecipe, tree, str(arguments))
    assert kinds == set(BENCHMARKS.table)


def test_every_recipe_that_the_page_names_is_there() -> None:
    for path in set(re.findall(r"recipes/evaluation/\w+\.yaml", TEXT)):
        assert (REPOSITORY / path).is_file(), path
