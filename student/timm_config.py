"""The configuration of a student whose trunk is a network of timm, and that of any student."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from student.config import Colour, HeadConfig, StudentConfig, StudentInit, check_pixels
from student.timm_network import TimmModel, timm_model
from teachers.features import FeatureSpec


class TimmStudentConfig(BaseModel):
    """The architecture and initial weights of a student that is a network of timm.

    The maps of its heads are u times denser than its own, along both axes, where the teachers have
    smaller cells: a head of a student of stride 32 for a teacher of 14 or 16 px patches has u = 2.
    `head.upsample` states another u.

    Attributes:
        kind: `timm`.
        model: timm's name of the network, with or without a tag, such as `convnext_tiny`.
        weights: `none` for random ones; `hub` for those that timm publishes under that name; or a
            local file with its state dict (safetensors or torch). `student.initial.build` loads
            them.
        level: the stage (block of a ViT) whose map is the student's, from 0, or from the end if
            negative; None for the last.
        head: the projection heads; the summary's reads the vector that timm pools for a classifier.
        init: a trained student of the same network to start from, in place of `weights`.
        mean: pixel mean per channel, for images in [0, 1]; None for that of the weights.
        std: pixel standard deviation per channel; None as for `mean`.
        activation_checkpointing: recompute each block's activations in the backward pass.
        drop_path: probability that a residual block is left out for an image in training, of the
            last block; it grows linearly from 0 in the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["timm"] = "timm"
    model: str
    # The words first, as any text is a path in a file's JSON.
    weights: Literal["hub", "none"] | Path = Field("none", union_mode="left_to_right")
    level: int | None = None
    head: HeadConfig = HeadConfig()
    init: StudentInit | None = None
    mean: Colour | None = None
    std: Colour | None = None
    activation_checkpointing: bool = False
    drop_path: float = Field(0.0, ge=0, lt=1)

    @property
    def network(self) -> TimmModel:
        """What is known of the network without its weights."""
        return timm_model(self.model)

    @property
    def architecture(self) -> str:
        """The model's name without the tag of its weights."""
        return self.model.partition(".")[0]

    @property
    def level_index(self) -> int:
        """The number of the level whose map is the student's."""
        count = len(self.network.levels)
        return count - 1 if self.level is None else self.level % count

    @property
    def patch_size(self) -> int:
        """Pixels of a cell of the student's map: the stride of its level."""
        return self.network.levels[self.level_index].stride

    def upsampling(self, teacher: str, target: FeatureSpec) -> int:
        """How many times denser a head's map is: as stated, or the nearest to the teacher's."""
        if teacher in self.head.upsample:
            return self.head.upsample[teacher]
        stride, due = self.patch_size, self.patch_size / target.patch_size
        whole = [u for u in range(1, stride + 1) if stride % u == 0]
        return min(whole, key=lambda u: (abs(math.log(u / due)), u))

    def cell_size(self, teacher: str, target: FeatureSpec) -> int:
        """Pixels of a cell of the grid that a teacher's features are made for: its head's."""
        return max(1, self.patch_size // self.upsampling(teacher, target))

    def resolved(self, targets: Mapping[str, FeatureSpec]) -> Self:
        """The configuration with the upsampling of every head stated."""
        upsample = {name: self.upsampling(name, target) for name, target in targets.items()}
        stated = {name: u for name, u in self.head.upsample.items() if name not in targets}
        head = self.head.model_copy(update={"upsample": upsample | stated})
        return self.model_copy(update={"head": head})

    def without_weights(self) -> Self:
        """The configuration of a student that has its weights already."""
        return self.model_copy(update={"init": None, "weights": "none"})

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        theirs = [k for k in value if k in StudentConfig.model_fields and k not in cls.model_fields]
        if theirs:
            raise ValueError(
                f"{', '.join(theirs)}: only for kind: vit; a network of timm has no such option. "
                f"Remove it, or choose kind: vit"
            )
        init = value.get("init")
        if isinstance(init, Mapping) and init.get("kind") == "timm":
            raise ValueError(
                "init: kind: timm starts a ViT of kind: vit; here give weights: hub, or a file"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = self.network.levels
        if self.level is not None and not -len(levels) <= self.level < len(levels):
            raise ValueError(
                f"level: {self.model!r} has no level {self.level}; it has "
                f"{self.network.describe_levels()}"
            )
        if self.init is not None and self.weights != "none":
            raise ValueError("init and weights: set only one of them")
        width = levels[self.level_index].channels
        if self.head.attention_blocks and width % self.head.attention_heads:
            raise ValueError(
                f"head.attention_heads: the map's {width} channels do not divide into "
                f"{self.head.attention_heads} heads; use a divisor, such as "
                f"{math.gcd(width, self.head.attention_heads)}"
            )
        check_pixels(self.mean, self.std)
        return self


def _kind(value: Any) -> Any:
    """The kind of a student; files and recipes of before there were others state none."""
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else "vit"


def parse_config(text: str) -> "AnyStudentConfig":
    """The configuration of a student of any kind, from JSON; raises pydantic's ValidationError."""
    try:
        kind = _kind(json.loads(text))
    except ValueError:
        kind = "vit"  # whose reader tells what is wrong
    model: type[AnyStudentConfig] = TimmStudentConfig if kind == "timm" else StudentConfig
    return model.model_validate_json(text)


def started_from(config: "AnyStudentConfig") -> str | None:
    """What a student starts from, as its recipe names it; None for random weights."""
    if isinstance(config.init, StudentInit):
        return str(config.init.path)
    if isinstance(config, TimmStudentConfig):
        return None if config.weights == "none" else config.model
    return None if config.init is None else config.init.model


AnyStudentConfig = StudentConfig | TimmStudentConfig
StudentSection = Annotated[
    Annotated[StudentConfig, Tag("vit")] | Annotated[TimmStudentConfig, Tag("timm")],
    Discriminator(_kind),
]
