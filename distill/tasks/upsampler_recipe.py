"""The recipe of an upsampler: one teacher, one upsampler, and the views that train it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, NonNegativeFloat, PositiveInt, SerializeAsAny, model_validator

from distill.benchmarks.upsampling import UpsamplerEvaluationConfig
from distill.engine.optimizer import OptimizerConfig
from distill.runtime.config import load_recipe
from distill.tasks.student_recipe import AnyTeacher
from distill.training.arms import ArmConfig, StepPlan
from distill.training.training_recipe import RunConfig, TrainingRecipe
from teachers.config import StrictConfig
from teachers.upsamplers.build import parse_upsampler
from teachers.upsamplers.consistency import ConsistencyConfig
from teachers.upsamplers.upsampler import UpsamplerConfig
from teachers.upsamplers.views import ViewsConfig

AnyUpsampler = Annotated[SerializeAsAny[UpsamplerConfig], BeforeValidator(parse_upsampler)]


class UpsamplerRun(RunConfig):
    """An upsampler's run.

    Attributes:
        batch_size: images of one optimiser step, over all ranks.
        micro_batch_size: images of one forward pass on one rank; gradients of the others are
            accumulated. None, or a number above a rank's share, is the whole share.
    """

    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None


class UpsamplerOptimizer(OptimizerConfig):
    """FeatSharp's published optimiser: NAdam, with weight decay of the spectral scales only.

    Attributes:
        weight_decay: of the scales of spectral reparametrisation; nothing else is decayed.
    """

    kind: Literal["adamw", "nadam"] = "nadam"
    lr: float = 5e-4
    weight_decay: NonNegativeFloat = 0.01


class RatesConfig(StrictConfig):
    """Learning rates of parameter groups, relative to `optimizer.lr`; FeatSharp's published ones.

    Attributes:
        guidance: of joint bilateral upsampling inside another upsampler.
        spectral: of the scales of spectral reparametrisation.
        uncertainty: of the uncertainty network.
    """

    guidance: NonNegativeFloat = 0.2
    spectral: NonNegativeFloat = 0.1
    uncertainty: NonNegativeFloat = 0.02


class UpsamplerRecipe(TrainingRecipe):
    """An upsampler for one teacher: `task: upsampler`.

    Attributes:
        teacher: the encoder, without an upsampler.
        upsampler: what is trained; kinds without weights learn their position bias and their
            downsampler only, as the baselines of a comparison do.
        views: the random warps under which upsampled maps must agree.
        consistency: the loss.
        bias: whether a position bias is learned, which removes the encoder's fixed pattern.
        spectral: whether the fusion's linear layers are trained in spectral reparametrisation, as
            published; slower at first.
        rates: learning rates of parameter groups.
        evaluation: the held-out images that `distill.evaluate` measures it on.
    """

    task: Literal["upsampler"] = "upsampler"
    run: UpsamplerRun
    teacher: AnyTeacher
    upsampler: AnyUpsampler
    views: ViewsConfig = ViewsConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    bias: bool = True
    spectral: bool = False
    rates: RatesConfig = RatesConfig()
    optimizer: UpsamplerOptimizer = UpsamplerOptimizer()
    evaluation: UpsamplerEvaluationConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.teacher.upsampler is not None:
            raise ValueError("teacher.upsampler: this run trains it; remove the key")
        if self.upsampler.kind == "trained":
            raise ValueError("upsampler: is trained already; give another kind and its options")
        if self.engine.precision == "fp16":
            raise ValueError(
                "engine.precision: fp16 would round PHI-S, in whose space the loss is, with the "
                "weights; use bf16, or fp32"
            )
        return self

    def require_ranks(self, ranks: int) -> None:
        """See `TrainingRecipe`."""
        self.step_plan((1, 1), "teacher", ranks)

    def step_plan(self, resolution: tuple[int, int], teacher: str, ranks: int) -> StepPlan:
        """The micro-batches of each of `ranks` processes, for images of (height, width) pixels."""
        run = self.run.model_dump(include={"batch_size", "micro_batch_size"})
        arm = ArmConfig.model_validate({"resolution": resolution, **run})
        return StepPlan({"": arm}, [teacher], seed=self.run.seed, ranks=ranks)


def load_upsampler_recipe(path: Path, overrides: list[str]) -> UpsamplerRecipe:
    """Reads an upsampler's recipe; see `load_recipe`."""
    return load_recipe(UpsamplerRecipe, path, overrides)
