"""The `engine` section of a recipe, and the configuration of DeepSpeed made from it.

DeepSpeed ignores misspelt keys in silence and has defaults that change results (it clips gradients
at 1.0 unless told otherwise), so every key that matters is written here, from typed fields.
"""

import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from distill.engine.optimizer import flat_size
from distill.runtime.processor import measured_precision
from teachers.config import StrictConfig


class EngineConfig(StrictConfig):
    """Sharding, precision, clipping and averaging.

    Attributes:
        zero_stage: what ZeRO (Rajbhandari et al., arXiv 1910.02054) splits between the ranks:
            1 the optimizer state, 2 also the gradients, 3 also the weights.
        precision: `bf16` keeps float32 weights and runs the trunk under autocast; `fp16` trains
            float16 weights with a float32 copy and a dynamic loss scale. With either, a GPU
            multiplies in TF32 what stays in float32. `auto` stands for bf16, or for fp32 on a
            processor that a measurement finds slower in bf16.
        gradient_clipping: largest norm of the gradient; 0 does not clip.
        ema_decay: decay per step of the exponential moving average of the weights, which is
            exported in place of the weights; 0 keeps no average.
    """

    zero_stage: int = 2
    precision: Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(measured_precision)] = (
        "fp32"
    )
    gradient_clipping: float = Field(1.0, ge=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)

    @field_validator("zero_stage")
    @classmethod
    def _stage(cls, stage: int) -> int:
        if stage == 0:
            raise ValueError(
                "ZeRO 0 is not supported: DeepSpeed 0.19 with it does not check gradients for NaN "
                "in fp32 and miscounts Adam's steps in bf16; use 1, also in a single process"
            )
        if stage not in (1, 2, 3):
            raise ValueError(f"must be 1, 2 or 3, got {stage}")
        return stage


def why_no_whole_average(config: EngineConfig) -> str | None:
    """Why the average cannot run as a module, starting with the key at fault; None if it can."""
    if not config.ema_decay:
        return "engine.ema_decay: is 0, so there is no average; C-RADIOv4 has 0.9996"
    if config.zero_stage == 3:
        return "engine.zero_stage: 3 leaves no rank with all the weights to average; use 1 or 2"
    if config.precision == "fp16":
        return "engine.precision: an average of fp16 weights would not move; use bf16 or fp32"
    return None


def deepspeed_config(config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """The dictionary that configures DeepSpeed."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            # True would copy the gradients into one buffer, of 2 GB whatever the module's size,
            # and from there into a second one as large as all of them. False leaves them where
            # autograd puts them and reduces them a bucket at a time.
            "contiguous_gradients": False,
            "reduce_bucket_size": flat_size(),
            # Stage 3 would split a rank's slice into groups of 1e9, which differ between ranks.
            "sub_group_size": 10**12,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "communication_data_type": "fp32",
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
