"""What `distill.evaluate --on SUITE` measured of a run's student, and of a file exported from it.

It is found where the suite's folder is `evaluation/NAME` of the run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from data.files import read_json_lines

Score = tuple[str, str, str, str]  # benchmark, what was measured, metric, value


def benchmark_scores(checkpoint: Path, out: Path) -> list[Score]:
    """The scores of a checkpoint's backbone, and those of the file of this name.

    Args:
        checkpoint: of a run, whose folder `evaluation` has the results.
        out: an exported file.

    Returns:
        A row for each benchmark and metric, means of all seeds.
    """
    run = checkpoint.parent.parent
    values: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted((run / "evaluation").glob("**/results.jsonl")):
        for row in read_json_lines(path):
            measured = _what(row.get("encoder", {}), checkpoint, out)
            for metric, value in row.get("figures", {}).items() if measured else ():
                values.setdefault((str(row["benchmark"]), str(measured), metric), []).append(value)
    return [(*key, f"{sum(each) / len(each):.4g}") for key, each in values.items()]


def _what(encoder: Mapping[str, Any], checkpoint: Path, out: Path) -> str | None:
    """`the student` or `this file`; None for another model, or a head.

    Rows name their models by a path relative to where the command ran, so names are compared.
    """
    name = PurePath(str(encoder.get("path", ""))).name
    if encoder.get("head") is not None or encoder.get("untrained"):
        return None
    if encoder.get("kind") == "onnx" and name == out.name:
        return "this file"
    if encoder.get("kind") == "student" and name in set(_names(checkpoint)):
        return "the student"
    return None


def _names(checkpoint: Path) -> Iterator[str]:
    """How a suite names a checkpoint: itself, or its run, whose newest checkpoint it is."""
    yield checkpoint.name
    others = sorted(each.name for each in checkpoint.parent.glob("step-*"))
    if others[-1:] == [checkpoint.name]:
        yield checkpoint.resolve().parent.parent.name
