"""The text tower of a benchmark, matched with the encoder that it judges."""

from distill.benchmarks.classification.summaries import SummaryConfig
from distill.runtime import distributed
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from teachers.text_tower import TextTower, TextTowerConfig


class TextConfig(SummaryConfig):
    """What benchmarks with text have in common.

    Attributes:
        text: the text tower of the model whose image vectors the encoder makes or, as a student's
            head, predicts.
    """

    text: TextTowerConfig


def load_text_tower(config: TextConfig, encoder: Teacher) -> TextTower:
    """The tower, on this process's device.

    Raises:
        TeacherError: it cannot be loaded, or its vectors are not of the encoder's size.
    """
    if encoder.spec.summary_dim is None:
        raise TeacherError(
            f"{type(encoder).__name__} has no summary that a text could be compared with"
        )
    tower = TextTower(config.text)
    if tower.dim != encoder.spec.summary_dim:
        raise TeacherError(
            f"text: the vectors of {config.text.model!r} have {tower.dim} numbers, the encoder's "
            f"summary {encoder.spec.summary_dim}; measure that model itself with summary "
            "`embedding`, or a student's head for it, {kind: student, path: RUN, head: NAME}"
        )
    return tower.to(distributed.device())
