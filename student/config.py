"""The student's configuration: architecture, heads and initial weights.

Sizes follow the ViTs of the RADIO family (AM-RADIO, arXiv 2312.06709), which are timm's; `giant`
has DINOv2's width, depth and heads, with the plain MLP of the other sizes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from teachers.features import FeatureSpec

Size = Literal["tiny", "small", "base", "large", "so400m", "huge", "giant", "bigG"]
Colour = tuple[float, float, float]

DEFAULT_REGISTERS = 4
_OF_TIMM = ("model", "weights", "level", "drop_path")  # of students of the other kind


class Shape(NamedTuple):
    """Dimensions of a ViT: channels, blocks, attention heads, hidden channels of the MLP."""

    width: int
    depth: int
    heads: int
    mlp_dim: int


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(192, 12, 3, 768),
    "small": Shape(384, 12, 6, 1536),
    "base": Shape(768, 12, 12, 3072),
    "large": Shape(1024, 24, 16, 4096),
    "so400m": Shape(1152, 27, 16, 4304),
    "huge": Shape(1280, 32, 16, 5120),
    "giant": Shape(1536, 40, 24, 6144),
    "bigG": Shape(1664, 48, 16, 8192),
}


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadConfig(_Config):
    """The projection heads, which map the student's tokens to the features of each teacher.

    Attributes:
        hidden_dim: hidden channels of the MLPs.
        num_layers: residual inner blocks.
        upsample: teacher name to u; the head of that teacher predicts a map u times denser than
            the student's own grid, along both axes. 1 for teachers not named.
        attention_blocks: transformer blocks over the patch tokens, without class tokens, before
            the MLP of a map, which then has no inner blocks. C-RADIOv4 has 2; 0 for none.
        attention_heads: attention heads of these blocks; RADIO's format has 16.
        attention_bias: whether their queries, keys and values have a bias, as those of students
            did that are older than this key; RADIO's format has none.
        only: the teachers that have a head; None for all. The others keep their class tokens,
            which every other token attends to, so that no other output changes.
    """

    hidden_dim: PositiveInt = 1520
    num_layers: NonNegativeInt = 3
    upsample: dict[str, PositiveInt] = Field(default_factory=dict)
    attention_blocks: NonNegativeInt = 0
    attention_heads: PositiveInt = 16
    attention_bias: bool = False
    only: tuple[str, ...] | None = None

    def has(self, teacher: str) -> bool:
        """Whether a teacher has a head."""
        return self.only is None or teacher in self.only


class WindowConfig(_Config):
    """Attention within windows (ViTDet), see `Student.forward`.

    Attributes:
        num_global: blocks with global attention: the last of every depth // num_global blocks, and
            the last of all. Above half of the depth, all blocks are global.
        prefix: class tokens and registers in windowed blocks: `copy` gives each window a copy and
            averages the copies afterwards, as NVIDIA TAO trains; `drop` leaves them out, as the
            published RADIO models do in inference.
    """

    num_global: PositiveInt = 4
    prefix: Literal["copy", "drop"] = "copy"


class TimmInit(_Config):
    """Initial trunk weights from a timm ViT of the same shape.

    Attributes:
        model: timm's model name, with or without a tag.
        weights: a local file with its state dict (safetensors or torch), or `hub` for timm's
            download and cache.
    """

    kind: Literal["timm"]
    model: str
    weights: Path | Literal["hub"] = "hub"


class StudentInit(_Config):
    """Initial weights from a student that `save_student` wrote.

    Attributes:
        path: its file or folder, or the name of one that ships, see
            `student.storage.student_file`. The trunk must have the same shape.
        heads: whether to load the heads as well, of teachers that both students have and where
            the dimensions agree. False: all heads start from random weights.
    """

    kind: Literal["student"]
    path: Path
    heads: bool = True


class StudentConfig(_Config):
    """The architecture and initial weights of a student that is a ViT.

    Attributes:
        kind: `vit`; not written to files, which had no other kind at first.
        size: preset of width, depth, heads and MLP width; each can be overridden.
        width: channels of a token.
        depth: transformer blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over `width`.
        patch_size: pixels per token, along both axes.
        max_resolution: side in pixels of the square that the position table covers.
        num_registers: register tokens; 4 when neither this nor `register_multiple` is given.
        register_multiple: choose the registers so that class tokens and registers together are a
            multiple of this; there is always at least one register.
        layer_scale: initial value of LayerScale; None for no LayerScale.
        final_norm: whether a LayerNorm follows the last block, as in timm's ViTs; RADIO's models
            have none, nor have most programs that read them.
        head: the projection heads.
        init: initial weights; None for random ones. `student.initial.build` loads them.
        mean: pixel mean per channel, for images in [0, 1]; None for that of `init`, or OpenAI
            CLIP's without one.
        std: pixel standard deviation per channel; None as for `mean`.
        activation_checkpointing: recompute each block's activations in the backward pass.
        position_dropout: probability that an image gets no position embeddings in training; 0.1
            in RADIO.
        windows: attention within windows, where a forward pass asks for it.
        isolated: teachers whose class token no other token attends to, so that they change no
            other output.
    """

    kind: Literal["vit"] = Field("vit", exclude=True)
    size: Size = "base"
    width: PositiveInt | None = None
    depth: PositiveInt | None = None
    heads: PositiveInt | None = None
    mlp_ratio: PositiveFloat | None = None
    patch_size: PositiveInt = 16
    max_resolution: PositiveInt = 1024
    num_registers: NonNegativeInt | None = None
    register_multiple: PositiveInt | None = None
    layer_scale: PositiveFloat | None = None
    final_norm: bool = False
    head: HeadConfig = HeadConfig()
    init: Annotated[TimmInit | StudentInit, Field(discriminator="kind")] | None = None
    mean: Colour | None = None
    std: Colour | None = None
    activation_checkpointing: bool = False
    position_dropout: float = Field(0.0, ge=0, lt=1)
    windows: WindowConfig = WindowConfig()
    isolated: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """The trunk's dimensions: the preset `size` with the overrides applied."""
        base = SHAPES[self.size]
        width = self.width or base.width
        ratio = self.mlp_ratio or base.mlp_dim / base.width
        return Shape(
            width, self.depth or base.depth, self.heads or base.heads, round(width * ratio)
        )

    def cell_size(self, teacher: str, target: FeatureSpec) -> int:
        """Pixels of a cell of the grid that a teacher's features are made for: a patch."""
        return self.patch_size

    def resolved(self, targets: Mapping[str, FeatureSpec]) -> Self:
        """The configuration with what depends on the teachers: nothing does."""
        return self

    def without_weights(self) -> Self:
        """The configuration of a student that has its weights already."""
        return self.model_copy(update={"init": None})

    @property
    def table_side(self) -> int:
        """Cells of the position table, along each axis."""
        return self.max_resolution // self.patch_size

    def count_registers(self, num_class_tokens: int) -> int:
        """Number of registers for a number of class tokens."""
        if self.register_multiple is not None:
            return self.register_multiple - num_class_tokens % self.register_multiple
        return DEFAULT_REGISTERS if self.num_registers is None else self.num_registers

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, value: Any) -> Any:
        theirs = [key for key in _OF_TIMM if isinstance(value, Mapping) and key in value]
        if theirs:
            raise ValueError(
                f"{', '.join(theirs)}: only for kind: timm; a ViT has no such option. Add kind: "
                "timm for a network of timm, or remove it"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        width, _, heads, _ = self.shape
        if width % heads:
            raise ValueError(
                f"width {width} does not divide into {heads} heads; set heads to a divisor of it, "
                f"or width to a multiple, such as {max(1, round(width / heads)) * heads}"
            )
        if self.head.attention_blocks and width % self.head.attention_heads:
            raise ValueError(
                f"head.attention_heads: width {width} does not divide into "
                f"{self.head.attention_heads} heads; use a divisor, such as {heads}"
            )
        p = self.patch_size
        if self.max_resolution % p:
            near = max(1, round(self.max_resolution / p)) * p
            raise ValueError(
                f"max_resolution {self.max_resolution} is not a multiple of patch_size {p}; "
                f"the nearest is {near}"
            )
        if self.num_registers is not None and self.register_multiple is not None:
            raise ValueError("num_registers and register_multiple: set only one of them")
        check_pixels(self.mean, self.std)
        return self


def check_pixels(mean: Colour | None, std: Colour | None) -> None:
    """Checks a pixel normalisation for images in [0, 1]; raises ValueError."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be set together; set both or none")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std {std} must be positive in every channel")
    for key, value in (("mean", mean), ("std", std)):
        if value is not None and not all(abs(each) <= 2 for each in value):
            raise ValueError(
                f"{key} {value} is for images in [0, 1]; divide values for 0..255 by 255"
            )
