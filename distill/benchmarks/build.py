"""Builds benchmarks from recipe entries: the table of kinds."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.runtime import distributed
from teachers.kinds import Registry
from teachers.teacher import Teacher

BENCHMARKS = Registry(
    noun="benchmark",
    table={
        "artefacts": "distill.benchmarks.artefacts:Artefacts",
        "depth": "distill.benchmarks.dense.depth:Depth",
        "detection": "distill.benchmarks.detection.detection:Detection",
        "keypoints": "distill.benchmarks.correspondence.keypoints:Keypoints",
        "knn": "distill.benchmarks.classification.knn:KNN",
        "linear": "distill.benchmarks.classification.linear:Linear",
        "logistic": "distill.benchmarks.classification.logistic:Logistic",
        "multitask": "distill.benchmarks.dense.multitask:MultiTask",
        "normals": "distill.benchmarks.dense.normals:Normals",
        "posed": "distill.benchmarks.correspondence.posed:Posed",
        "retrieval": "distill.benchmarks.classification.retrieval:Retrieval",
        "segmentation": "distill.benchmarks.dense.segmentation:Segmentation",
        "zero_shot": "distill.benchmarks.classification.zero_shot:ZeroShot",
    },
    base=Benchmark,
    config=BenchmarkConfig,
)


def parse_benchmark(value: Any) -> BenchmarkConfig:
    """Validates a recipe entry with the `Config` of the benchmark that its `kind` names.

    Raises:
        TeacherError: an unknown kind or key, a wrong value, or a class that is no benchmark.
    """
    return BENCHMARKS.parse(value)


def build_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Builds a benchmark from its config."""
    return BENCHMARKS.resolve(config.kind).from_config(config)


AnyBenchmark = Annotated[SerializeAsAny[BenchmarkConfig], BeforeValidator(parse_benchmark)]


def measure_into(benchmark: Benchmark, encoder: Teacher, seed: int, folder: Path) -> Measurement:
    """Creates the folder, then measures; see `Benchmark.measure`. Every rank calls this."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    return benchmark.measure(encoder, seed, folder)
