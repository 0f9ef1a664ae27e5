"""What a recipe says about its images."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

_PILLOW_MAX_PIXELS = 178_956_970  # twice its MAX_IMAGE_PIXELS; it opens nothing larger


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class SourceConfig(BaseModel):
    """One set of shards.

    Attributes:
        shards: a path, glob, brace range (`{000..009}`), folder of `*.tar` or URL; or a list.
        weight: relative share of the samples drawn from this source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    weight: PositiveFloat = 1.0


class AugmentationConfig(BaseModel):
    """Random-resized crop and flip (Szegedy et al. 2015, section 6; torchvision's defaults).

    Attributes:
        scale: smallest and largest share of the image's area that a crop covers.
        ratio: smallest and largest stretch of the crop's aspect, relative to the output's.
        flip: probability of a horizontal flip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[PositiveFloat, Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name}: the smallest value, {low}, is above the largest, {high}")
        return self


class DataConfig(BaseModel):
    """A mixture of sources and how their images are read.

    Attributes:
        sources: at least one.
        augmentation: random crop and flip; "none" covers the output and crops its centre.
        workers: processes that decode for each rank; 0 decodes in the training process.
        prefetch: micro-batches that each worker keeps ready.
        worker_start: how workers begin; "fork" is quickest, the others share no state.
        decoder: JPEG decoder; "auto" takes simplejpeg where installed. Both give the same pixels.
        draft: decode JPEGs at 1/2, 1/4 or 1/8 size where the crop stays as large as the output.
            Up to twice as fast on large photographs; changes pixels a little.
        max_pixels: images with more are bad samples, refused on their header. At most what
            Pillow opens at all: its limit guards every decoder, and belongs to the whole process.
        max_bad_share: the run stops when clearly more than this share of the distinct samples
            seen is bad (see `data.bad.BadCounter`); 0 stops at the first.
        shuffle_window: shards whose samples are shuffled together (in streaming mode, hundreds
            of samples a lane).
        verify_checksums: compare each shard with its manifest's SHA-256 while indexing.
        index_dir: where the index of local shards is kept; None lets the run choose.
        allow_pipe: run `pipe:` URLs, which are shell commands.
        lanes: streaming mode only: independent sequences of shards, a multiple of ranks x workers
            and a divisor of the global batch size; part of the order, so keep it over a run. Where
            a step's parts have ranks of their own, each has its share of the lanes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    augmentation: AugmentationConfig | Literal["none"] = AugmentationConfig()
    workers: NonNegativeInt = 2
    prefetch: PositiveInt = 2
    worker_start: Literal["fork", "forkserver", "spawn"] = "fork"
    decoder: Literal["auto", "pil", "simplejpeg"] = "auto"
    draft: bool = False
    max_pixels: Annotated[int, Field(gt=0, le=_PILLOW_MAX_PIXELS)] = 100_000_000
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = 0.001
    shuffle_window: PositiveInt = 16
    verify_checksums: bool = False
    index_dir: Path | None = None
    allow_pipe: bool = False
    lanes: PositiveInt = 8
