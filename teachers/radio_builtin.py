"""The config of transformers' own RADIO model (`model_type: radio`), as `args` of the public one.

The architecture is in fields of `config.json`, with transformers' defaults where one is missing.
Class tokens belong to no teacher there: their names here are `cls_0`, `cls_1`, ..., unless the
config has the public `args` too, which vLLM reads. `radio_builtin_weights` has the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from teachers.errors import TeacherError
from teachers.normalization import OPENAI_MEAN, OPENAI_STD
from teachers.pixels import Colour
from teachers.radio_architecture import class_tokens_of, registers_of, unnamed

_Summary = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class BuiltinConfig(BaseModel):
    """What `config.json` says, by transformers' fields and their defaults.

    Fields with a single value are those of which this reader knows no other.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: PositiveInt = 1280
    num_hidden_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 16
    head_dim: PositiveInt | None = None
    mlp_ratio: PositiveFloat = 4.0
    use_swiglu_ffn: bool = False
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = Field(1e-6, ge=1e-6, le=1e-6)
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    num_channels: Literal[3] = 3
    patch_size: PositiveInt = 16
    max_img_size: PositiveInt = 2048
    num_cls_tokens: PositiveInt = 3
    num_registers: NonNegativeInt = 7
    video_temporal_patch_size: None = None
    summary_idxs: _Summary | None = None
    norm_mean: Colour = OPENAI_MEAN
    norm_std: Colour = OPENAI_STD

    @property
    def mlp_dim(self) -> int:
        """Hidden channels of the MLP; of the gated one, of each half."""
        full = int(self.hidden_size * self.mlp_ratio)
        return (int(full * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else full

    @property
    def table_side(self) -> int:
        """Cells of the position table, along each axis."""
        return self.max_img_size // self.patch_size

    @property
    def summary(self) -> tuple[int, ...]:
        """The class tokens that form the summary, in its order."""
        return (0, 1) if self.summary_idxs is None else self.summary_idxs

    @model_validator(mode="after")
    def _check(self) -> Self:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads or self.head_dim not in (None, width // heads):
            raise ValueError(
                f"hidden_size {width} is not num_attention_heads {heads} times head_dim "
                f"{self.head_dim or width / heads:g}"
            )
        if max(self.summary) >= self.num_cls_tokens:
            raise ValueError(
                f"summary_idxs {list(self.summary)}: there are {self.num_cls_tokens} class tokens "
                "(num_cls_tokens)"
            )
        return self


def read_builtin(config: Mapping[str, Any], path: Path) -> BuiltinConfig | None:
    """The fields of a config; None if it is another one, with `args` alone.

    Args:
        config: the content of `config.json`.
        path: the weights file beside it, for messages.

    Raises:
        TeacherError: a field is invalid, or has a value that this reader does not know.
    """
    if config.get("model_type") != "radio" or ("args" in config and "hidden_size" not in config):
        return None
    try:
        return BuiltinConfig.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        came = f", got {problem['input']!r}" if key else ""
        what = problem["msg"].removeprefix("Value error, ")
        raise TeacherError(
            f"{path.parent / 'config.json'}: {key}{': ' if key else ''}{what}{came}"
        ) from None


def public_args(builtin: BuiltinConfig, stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The public `args` of such a model.

    Args:
        builtin: its fields.
        stated: the `args` that its config has too, which name the teachers; empty without.
        path: the weights file, for messages.

    Raises:
        TeacherError: both say different things.
    """
    hidden = builtin.mlp_dim * (2 if builtin.use_swiglu_ffn else 1)
    args: dict[str, Any] = {
        "model": "vit_base_patch16_224",
        "model_kwargs": {
            "embed_dim": builtin.hidden_size,
            "depth": builtin.num_hidden_layers,
            "num_heads": builtin.num_attention_heads,
            "mlp_ratio": (hidden + 0.5) / builtin.hidden_size,  # timm truncates the product
            "qkv_bias": builtin.qkv_bias,
        },
        "cpe_max_size": builtin.table_side * builtin.patch_size,
        "cls_token_per_teacher": True,
        "cpe_num_registers": builtin.num_registers,
        "teachers": [
            {"name": name, "use_summary": i in builtin.summary}
            for i, name in enumerate(unnamed(builtin.num_cls_tokens))
        ],
    }
    if not stated:
        return args
    names, summary = class_tokens_of(stated, path)
    for key, own, theirs in (
        ("num_cls_tokens", builtin.num_cls_tokens, len(names)),
        ("summary_idxs", list(builtin.summary), [names.index(name) for name in summary]),
        ("num_registers", builtin.num_registers, registers_of(stated, len(names))),
        ("max_img_size", args["cpe_max_size"], stated.get("cpe_max_size")),
    ):
        if own != theirs:
            raise TeacherError(
                f"{path.parent / 'config.json'}: {key} means {own}, but its args mean {theirs}; "
                "correct one of them"
            )
    return args | {k: stated.get(k) for k in ("cls_token_per_teacher", "teachers")}
