"""The losses of a student and their weights, as a recipe names them."""

from typing import Literal

from pydantic import Field, NonNegativeInt

from distill.objective.mesa import MesaConfig
from distill.objective.views import EquivarianceConfig
from distill.objective.weighting import BalancingConfig
from teachers.config import StrictConfig
from teachers.features import FeatureSpec


class TeacherWeights(StrictConfig):
    """Weights of one teacher's losses; a teacher with both at zero is not run at all.

    Attributes:
        summary: weight of the summary loss; ignored for a teacher without a summary.
        spatial: weight of the spatial loss.
    """

    summary: float = Field(1.0, ge=0)
    spatial: float = Field(1.0, ge=0)

    @property
    def count(self) -> bool:
        """Whether one of them is above zero."""
        return self.summary > 0 or self.spatial > 0


class ObjectiveConfig(StrictConfig):
    """The losses of a student.

    Attributes:
        standardisation: `phi_s` rotates and scales each teacher's map so that every channel has
            variance 1 (PHI-S); `none` leaves the map as it is.
        summary: `cosine`, or `angle`: squared angle over the teacher's angular dispersion.
        spatial: `mse`, or `cosine_smooth_l1`.
        weights: teacher name to weights; both are 1 for a teacher without an entry.
        equivariance: how the views of student and teachers differ; None: all see the same.
        mesa: agreement with the moving average of the student; None for none.
        dropping: probability that a teacher is left out for an image, see `weighting.kept_shares`.
        balancing: divides each loss by its running mean; None does not.
        tolerated_non_finite: losses of a teacher on a micro-batch, over the whole run and all
            ranks, that may be NaN or infinite: they are left out and reported. The next one ends
            the run.
    """

    standardisation: Literal["phi_s", "none"] = "phi_s"
    summary: Literal["cosine", "angle"] = "cosine"
    spatial: Literal["mse", "cosine_smooth_l1"] = "mse"
    weights: dict[str, TeacherWeights] = {}
    equivariance: EquivarianceConfig | None = None
    mesa: MesaConfig | None = None
    dropping: float = Field(0.0, ge=0, lt=1)
    balancing: BalancingConfig | None = None
    tolerated_non_finite: NonNegativeInt = 0

    def weights_of(self, teacher: str) -> TeacherWeights:
        """The weights of one teacher."""
        return self.weights.get(teacher, TeacherWeights())

    def losses_of(self, teacher: str, spec: FeatureSpec) -> list[str]:
        """The names of a teacher's losses with a weight above zero; it is not run without any."""
        weights = self.weights_of(teacher)
        summary = weights.summary > 0 and spec.summary_dim is not None
        kinds = {"summary": summary, "spatial": weights.spatial > 0}
        return [f"{teacher}/{kind}" for kind, counts in kinds.items() if counts]

    @property
    def needs_statistics(self) -> bool:
        """Whether any loss depends on statistics of the targets."""
        return self.standardisation != "none" or self.summary == "angle"
