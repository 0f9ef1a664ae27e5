"""The text tower of a benchmark, which must match the encoder."""

from distill.benchmarks.classification.summaries import SummaryConfig
from distill.runtime import distributed
from teachers.errors import TeacherError
from teachers.messages import say_once
from teachers.teacher import Teacher
from teachers.text_tower import TextTower, TextTowerConfig


class TextConfig(SummaryConfig):
    """The part of the recipe entry that all benchmarks with text share.

    Attributes:
        text: the text tower of the model whose image vectors the encoder computes or, as a
            student's head, predicts.
    """

    text: TextTowerConfig


def load_text_tower(config: TextConfig, encoder: Teacher) -> TextTower:
    """The tower, on this process's device.

    Raises:
        TeacherError: it cannot be loaded, or its vectors do not have the encoder's size.
    """
    if encoder.spec.summary_dim is None:
        raise TeacherError(f"{type(encoder).__name__} has no summary to compare with texts")
    tower = TextTower(config.text)
    if tower.dim != encoder.spec.summary_dim:
        raise TeacherError(
            f"text: the vectors of {config.text.model!r} have {tower.dim} numbers, the encoder's "
            f"summary {encoder.spec.summary_dim}; measure that model itself with summary "
            "`embedding`, or a student's head for it, {kind: student, path: RUN, head: NAME}"
        )
    own, theirs = getattr(encoder, "weights_file", None), tower.weights_file
    if own is not None and theirs is not None and own.resolve() != theirs.resolve():
        say_once(
            f"text {config.text.model}: from {theirs}, but the encoder is from {own}; their "
            "vectors can be compared only if they were trained together"
        )
    return tower.to(distributed.device())
