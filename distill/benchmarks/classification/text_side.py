"""The text tower of a benchmark, which must match the encoder."""

from pathlib import Path

from data.labelled.digest import hash_of
from distill.benchmarks.classification.summaries import SummaryConfig
from distill.runtime import distributed
from teachers.errors import TeacherError
from teachers.files import SHIPPED
from teachers.messages import say_once
from teachers.open_clip_source import find_source, locate_weights
from teachers.teacher import Teacher
from teachers.text_tower import TextTower, TextTowerConfig


class TextConfig(SummaryConfig):
    """The part of the recipe entry that all benchmarks with text share.

    Attributes:
        text: the text tower of the model whose image vectors the encoder computes or, as a
            student's head, predicts.
    """

    text: TextTowerConfig


def check_text(config: TextConfig, encoder: Teacher) -> None:
    """Checks that the tower exists and matches the encoder; reads no weights.

    Raises:
        TeacherError: there is no such tower, or its vectors do not have the encoder's size.
    """
    _require_summary(encoder)
    source = find_source(config.text.model, config.text.weights)
    _require_match(config, encoder, source.model_cfg["embed_dim"])
    _say_origins(config, encoder, locate_weights(source))


def text_identity(config: TextConfig) -> str:
    """Hashes of the tower's local files, which may be exchanged under their names."""
    hashes = []
    shipped = SHIPPED / config.text.model
    for value in (config.text.model, config.text.weights):
        path = Path(value or "")
        if value == config.text.model and shipped.is_dir():
            path = shipped
        files = sorted(path.rglob("*")) if value and path.is_dir() else [path]
        hashes += [hash_of(each).hex() for each in files if value and each.is_file()]
    return repr(hashes)


def load_text_tower(config: TextConfig, encoder: Teacher) -> TextTower:
    """The tower, on this process's device.

    Raises:
        TeacherError: it cannot be loaded, or its vectors do not have the encoder's size.
    """
    _require_summary(encoder)
    tower = TextTower(config.text)
    _require_match(config, encoder, tower.dim)
    _say_origins(config, encoder, tower.weights_file)
    return tower.to(distributed.device())


def _require_summary(encoder: Teacher) -> None:
    if encoder.spec.summary_dim is None:
        raise TeacherError(f"{type(encoder).__name__} has no summary to compare with texts")


def _require_match(config: TextConfig, encoder: Teacher, dim: int) -> None:
    if dim != encoder.spec.summary_dim:
        raise TeacherError(
            f"text: the vectors of {config.text.model!r} have {dim} numbers, the encoder's "
            f"summary {encoder.spec.summary_dim}; measure that model itself with summary "
            "`embedding`, or a student's head for it, {kind: student, path: RUN, head: NAME}"
        )


def _say_origins(config: TextConfig, encoder: Teacher, theirs: Path | None) -> None:
    """Says once where tower and encoder are from different files."""
    own = getattr(encoder, "weights_file", None)
    if own is not None and theirs is not None and own.resolve() != theirs.resolve():
        say_once(
            f"text {config.text.model}: from {theirs}, but the encoder is from {own}; their "
            "vectors can be compared only if they were trained together"
        )
