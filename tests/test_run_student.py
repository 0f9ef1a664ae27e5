"""Whole student runs, as a user starts them."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from PIL import Image

import student
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.runtime.checkpoint import find_checkpoints
from distill.runtime.tracking import read_metrics
from distill.tasks.student_encoder import StudentEncoder
from tests.doubles import Ramp
from tests.tiny_run import (
    DEADLOCK_S,
    STEPS,
    assert_same_weights,
    launcher_command,
    plain_command,
    run,
    run_until_killed,
    start,
    wait_for_metrics,
    write_recipe,
)

pytestmark = pytest.mark.process

RAMP = {"every": 16, "run": {"ramp": {"kind": "tests.doubles:Ramp"}}}


def _evaluations(folder: Path) -> list[tuple[int, float]]:
    lines = read_metrics(folder / "run")
    return [(x["step"], x["eval/ramp/largest"]) for x in lines if "eval/ramp/largest" in x]


def _ramp_of_checkpoint(folder: Path, out: Path) -> float:
    path = folder / f"run/checkpoints/step-{STEPS:08d}/student.safetensors"
    benchmark = Ramp(BenchmarkConfig(kind="tests.doubles:Ramp"))
    return benchmark.measure(StudentEncoder(student.load(path)), 0, out).metrics["largest"]


def _status(folder: Path) -> str:
    return str(json.loads((folder / "run/STATUS.json").read_text())["status"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run, of a fresh interpreter."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(plain_command(write_recipe(folder)), folder, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_recipe_versions_metrics_and_whole_checkpoints(finished: Path) -> None:
    assert _status(finished) == "done"
    folder = finished / "run"
    assert [p.name for p in find_checkpoints(folder / "checkpoints")] == [
        "step-00000024",
        "step-00000016",
    ]
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for name in ("loss", "loss/expert/spatial", "loss/expert/summary", "lr", "grad_norm"):
        assert all(line[name] > 0 for line in metrics[:-1]), name
    for name in ("images_per_s", "peak_memory_gb"):
        assert all(name in line for line in metrics), name
    parts = {"data", "teacher/expert", "student", "optimizer", "other"}
    for line in metrics:
        shares = {n: v for n, v in line.items() if n.startswith("time/")}
        assert shares.keys() - {"time/communication"} == {f"time/{part}" for part in parts}
        assert sum(shares.values()) == pytest.approx(1)
    assert json.loads((folder / "versions.json").read_text())["deepspeed"] == "0.19.8"


def test_the_checkpoint_holds_a_student_that_loads_in_one_line(finished: Path) -> None:
    model = student.load(finished / "run/checkpoints/step-00000024/student.safetensors")
    assert list(model.targets) == ["expert"]
    assert not model.training


def test_a_finished_run_that_is_started_again_changes_nothing(finished: Path) -> None:
    path = finished / "run/checkpoints/step-00000024/student.safetensors"
    before = path.read_bytes()
    done = run(plain_command(finished / "recipe.yaml"), finished)
    assert done.returncode == 0
    assert path.read_bytes() == before
    assert len(read_metrics(finished / "run")) == STEPS


def test_another_recipe_in_the_same_folder_is_refused(finished: Path) -> None:
    done = run(plain_command(finished / "recipe.yaml", "optimizer.lr=0.5"), finished)
    assert done.returncode == 2
    assert "already holds a run of another recipe (optimizer.lr: 0.001 there, 0.5 here)" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, in a later one, at some other time; then a start that ends."""
    data = {"sources": [{"shards": str(finished / "shards")}]}
    command = plain_command(write_recipe(tmp_path, data=data, checkpoint={"every": 2}))
    run_until_killed(command, tmp_path, at=".tmp-step-00000002")
    run_until_killed(command, tmp_path, at=".tmp-step-00000006/student.safetensors")
    run_until_killed(command, tmp_path, at=".tmp-step-00000008/MANIFEST.json")
    process = start(command, tmp_path)
    wait_for_metrics(tmp_path / "run", process)
    process.kill()
    process.wait()
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(finished / "run", tmp_path / "run", STEPS)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_sigterm_saves_ends_with_0_and_the_rest_follows(finished: Path, tmp_path: Path) -> None:
    shards = {"sources": [{"shards": str(finished / "shards")}]}
    recipe = write_recipe(tmp_path, data=shards, checkpoint={"every": 10_000})
    command = plain_command(recipe, "run.steps=10000", "schedule.kind=constant")
    process = start(command, tmp_path)
    wait_for_metrics(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLOCK_S) == 0
    assert _status(tmp_path) == "preempted"
    (saved,) = find_checkpoints(tmp_path / "run/checkpoints")
    assert int(saved.name.removeprefix("step-")) == len(read_metrics(tmp_path / "run"))


def test_benchmarks_on_the_way_change_no_bit_and_may_come_and_go(
    finished: Path, tmp_path: Path
) -> None:
    """They measure what the checkpoint of that step holds, the moving average of the weights."""
    shards = {"sources": [{"shards": str(finished / "shards")}]}
    recipe = write_recipe(tmp_path, data=shards, benchmarks=RAMP)
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(finished / "run", tmp_path / "run", STEPS)
    figures = _evaluations(tmp_path)
    assert [step for step, _ in figures] == [0, 16, STEPS]
    assert len({figure for _, figure in figures}) == 3
    assert figures[-1][1] == pytest.approx(_ramp_of_checkpoint(tmp_path, tmp_path), rel=1e-6)
    assert "step 16/24  eval/ramp/largest" in done.stderr
    assert (tmp_path / "run/benchmarks/ramp/step-00000016/ramp.png").exists()
    other = "benchmarks.run={other: {kind: 'tests.doubles:Ramp'}}"
    done = run(plain_command(recipe, other), tmp_path)
    assert done.returncode == 0, done.stderr
    assert _evaluations(tmp_path) == figures
    last = read_metrics(tmp_path / "run")[-1]
    assert last == {"step": STEPS, "eval/other/largest": figures[-1][1]}


def _shared_memory() -> set[str]:
    """Files in /dev/shm, but for joblib's locks, which other tests make meanwhile."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.loky-")}


def _assert_two_ranks_trained_as_one(finished: Path, folder: Path) -> None:
    """Both had the benchmark `RAMP` or neither; two ranks draw position windows of their own."""
    assert _status(folder) == "done"
    one, two = read_metrics(finished / "run"), read_metrics(folder / "run")
    two = [line for line in two if "loss" in line]
    assert [line["images"] for line in two] == [line["images"] for line in one]
    assert all(line["time/communication"] > 0 for line in two)
    assert {line["slowest_rank"] for line in two} <= {0, 1}
    assert all(1 <= line["slowest_rank_work"] <= 2 for line in two)


def test_two_runs_side_by_side_under_the_launcher(finished: Path, tmp_path: Path) -> None:
    """Both with the launcher's own default port, which neither takes, and with nothing left.

    Pictures of a rank's images and benchmarks, which one of them has, change no weight.
    """
    shared = _shared_memory()
    data = {"sources": [{"shards": str(finished / "shards")}]}
    more = {"tracking": {"every": 1, "pictures_every": 4}, "benchmarks": RAMP}
    folders = [tmp_path / name for name in ("plain", "more")]
    processes = []
    for folder, sections in zip(folders, ({}, more), strict=True):
        folder.mkdir()
        recipe = write_recipe(folder, data=data, engine={"zero_stage": 1}, **sections)
        processes.append(start(launcher_command(recipe, ranks=2), folder))
    assert [process.wait(DEADLOCK_S) for process in processes] == [0, 0]
    for folder in folders:
        _assert_two_ranks_trained_as_one(finished, folder)
    assert_same_weights(folders[0] / "run", folders[1] / "run", STEPS)
    figures = _evaluations(folders[1])
    assert [step for step, _ in figures] == [0, 16, STEPS]
    assert figures[-1][1] == pytest.approx(_ramp_of_checkpoint(folders[1], tmp_path), rel=1e-6)
    drawn = [sorted(folder.glob("run/pictures/*.png")) for folder in folders]
    assert [len(pictures) for pictures in drawn] == [0, STEPS // 4]
    with Image.open(drawn[1][-1]) as picture:
        picture.load()
        assert picture.size == (192 + 24 + 2 * 198 - 6, 2 * 22 + 2 * 198 - 6)
    assert not list(tmp_path.rglob(".meeting-*"))
    assert _shared_memory() <= shared


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_under_other_zero_stages(stage: int, finished: Path, tmp_path: Path) -> None:
    data = {"sources": [{"shards": str(finished / "shards")}]}
    recipe = write_recipe(
        tmp_path, data=data, benchmarks=RAMP, tracking={"every": 1, "pictures_every": STEPS}
    )
    done = run(plain_command(recipe, f"engine.zero_stage={stage}"), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    _assert_two_ranks_trained_as_one(finished, tmp_path)
    figures = _evaluations(tmp_path)
    assert figures[-1][1] == pytest.approx(_ramp_of_checkpoint(tmp_path, tmp_path), rel=1e-6)
    assert (tmp_path / f"run/pictures/step-{STEPS:08d}.png").is_file()


def test_killing_the_launcher_saves_and_leaves_no_process(finished: Path, tmp_path: Path) -> None:
    shards = {"sources": [{"shards": str(finished / "shards")}]}
    recipe = write_recipe(tmp_path, data=shards, checkpoint={"every": 10_000})
    command = launcher_command(recipe, "run.steps=10000", "schedule.kind=constant", ranks=2)
    process = start(command, tmp_path)
    wait_for_metrics(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    process.wait(DEADLOCK_S)
    _, alive = psutil.wait_procs(_processes_of(recipe), DEADLOCK_S)
    assert not alive
    assert _status(tmp_path) == "preempted"
    assert len(find_checkpoints(tmp_path / "run/checkpoints")) == 1


def _processes_of(recipe: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(recipe) in (process.info["cmdline"] or [])
    ]


NAN_TEACHER = """
import torch
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher

class Faulty(Teacher):
    def __init__(self, config):
        spec = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=16, resolution=(32, 32))
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.calls = 0

    def extract(self, images):
        self.calls += 1
        maps = images.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).repeat(1, 2, 1, 1)[:, :4]
        return Features(None, maps * (float("nan") if self.calls > 12 else 1.0))
"""


def test_nan_stops_the_run_with_the_keys_of_the_batch(finished: Path, tmp_path: Path) -> None:
    """The teacher is a user's own class, found in the current directory."""
    (tmp_path / "faulty.py").write_text(NAN_TEACHER)
    recipe = write_recipe(
        tmp_path,
        data={"sources": [{"shards": str(finished / "shards")}]},
        teachers={"expert": {"kind": "faulty:Faulty"}},
    )
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 1
    assert (
        "not finite, so the run stops:\n  rank 0: loss, loss/expert/spatial; keys: " in done.stderr
    )
    assert "shards/000000.tar/" in done.stderr or "000000.tar/" in done.stderr
    assert "Traceback" not in done.stderr
    assert _status(tmp_path) == "failed"


def test_the_dry_run_prints_the_resolved_recipe_and_makes_no_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = run([*plain_command(recipe), "--dry-run", "run.seed=7"], tmp_path)
    assert done.returncode == 0
    assert "seed: 7" in done.stdout
    assert not (tmp_path / "run").exists()
