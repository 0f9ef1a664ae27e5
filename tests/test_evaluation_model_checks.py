"""All models of a suite are built and fitted to its benchmarks before the first is measured."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.nn.functional as F
from torch import Tensor

from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.evaluation.kinds import register_evaluation_kinds
from distill.evaluation.suite import SuiteRecipe, run_suite
from distill.runtime.config import validate
from distill.runtime.errors import USER_ERRORS
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher, TeacherConfig
from tests.label_sets import halves, metres, write_depth, write_labels

COLOURS = {"kind": "pixels", "patch_size": 4, "resolution": [8, 8]}
PROBE = {"steps": 2, "batch_size": 2, "lr": 0.01}


class Watched(Benchmark):
    """Counts what it measures."""

    measured: ClassVar[list[str]] = []

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        self.measured.append(type(encoder).__name__)
        return Measurement({"score": 1.0}, {})


class OneSize(Teacher):
    """An encoder of images of 20 x 20 px."""

    def __init__(self, config: TeacherConfig) -> None:
        spec = FeatureSpec(summary_dim=None, spatial_dim=3, patch_size=4, resolution=(20, 20))
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))

    def extract(self, images: Tensor) -> Features:
        return Features(None, F.avg_pool2d(images, 4))


@pytest.fixture(autouse=True)
def _kinds() -> None:
    register_evaluation_kinds()
    Watched.measured.clear()


def run(folder: Path, models: dict[str, Any], **benchmarks: Any) -> list[dict[str, Any]]:
    watched = {"watched": {"kind": "tests.test_evaluation_model_checks:Watched"}}
    tree = {
        "task": "benchmarks",
        "dir": str(folder / "results"),
        "models": {"first": COLOURS} | models,
        "benchmarks": watched | benchmarks,
    }
    return run_suite(validate(SuiteRecipe, tree, "suite"))


@pytest.mark.parametrize(
    "model, message",
    [
        ({"kind": "timm", "model": "test_vitt"}, r"models.second: .*did you mean 'test_vit"),
        (
            {"kind": "timm", "model": "test_vit", "weights": "nowhere.safetensors"},
            r"models.second: weights: 'nowhere.safetensors' is not a file",
        ),
        ({"kind": "student", "path": "no-run"}, r"models.second: .*no-run"),
        (
            {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [33, 33]},
            r"models.second: resolution: \(33, 33\) is not a multiple",
        ),
    ],
)
def test_a_wrong_second_model_is_found_before_the_first_is_measured(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(USER_ERRORS, match=message):
        run(tmp_path, {"second": model})
    assert Watched.measured == []


def fixed_size(name: str, folder: Path) -> dict[str, Any]:
    """A benchmark that an encoder of one size does not fit."""
    maps = {"train": [halves(0, 1)], "test": [halves(1, 0)]}
    if name == "segmentation":
        dataset = write_labels(folder, maps) | {"classes": ["a", "b"]}
        return {"kind": name, "dataset": dataset, "probe": PROBE}
    dataset = write_depth(folder, [metres()]) | {"unit": 1.0}
    head = {"kind": "linear" if name == "depth" else "dpt"}
    return {"kind": "depth", "dataset": dataset, "probe": PROBE, "head": head}


@pytest.mark.parametrize(
    "name, message",
    [
        ("segmentation", "images of 8 x 8 px: this encoder takes 20 x 20 px only"),
        ("depth", "images of 12 x 16 px: this encoder takes 20 x 20 px only"),
    ],
)
def test_a_second_model_that_does_not_fit_is_found_before_the_first_is_measured(
    tmp_path: Path, name: str, message: str
) -> None:
    second = {"kind": "tests.test_evaluation_model_checks:OneSize"}
    entry = fixed_size(name, tmp_path / "set")
    with pytest.raises(
        TeacherError, match=f"models.second does not fit benchmarks.dense: {message}"
    ):
        run(tmp_path, {"second": second}, dense=entry)
    assert Watched.measured == []


def test_a_head_that_a_model_cannot_feed_is_found_before_any_is_measured(tmp_path: Path) -> None:
    entry = fixed_size("dpt", tmp_path / "set")
    with pytest.raises(TeacherError, match=r"models.first does not fit .*Pixels returns its last"):
        run(tmp_path, {}, dense=entry)
    assert Watched.measured == []


def test_the_only_model_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.evaluation import model_checks, suite

    built = []
    for module in (model_checks, suite):
        build = module.build_teacher
        monkeypatch.setattr(
            module, "build_teacher", lambda *a, build=build, **k: built.append(1) or build(*a, **k)
        )
    assert len(run(tmp_path, {})) == 1
    assert len(built) == 1
    run(tmp_path, {"second": COLOURS | {"patch_size": 2}})
    assert len(built) == 1 + 2 + 1  # both are checked; the first is kept, the second measured
