"""The `data` section of a recipe: sources of images, augmentation and how they are read."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

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

MAX_PIXELS = 100_000_000  # of an image, unless a recipe sets another limit
_PILLOW_MAX_PIXELS = 178_956_970  # Pillow opens nothing above twice its MAX_IMAGE_PIXELS


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class SourceConfig(BaseModel):
    """One set of shards.

    Attributes:
        shards: a path, glob, brace range (`{000..009}`), folder of `*.tar`, URL, or a list of them.
        weight: of this source among all; only the weights' proportions matter.
        crops: number of different random crops of an image, which its epochs take in turn, so that
            cached targets serve any number of epochs; None for another crop in every epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    weight: PositiveFloat = 1.0
    crops: PositiveInt | None = None


class AugmentationConfig(BaseModel):
    """Random resized crop and flip (Szegedy et al. 2015, section 6; torchvision's defaults).

    Attributes:
        scale: smallest and largest area of a crop, as fractions of the image's area.
        ratio: smallest and largest aspect ratio of a crop, relative to the output's.
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
        augmentation: random crop and flip; "none" resizes to cover the output and crops the centre.
        workers: decoding processes of each rank; 0 decodes in the training process.
        prefetch: micro-batches that each worker prepares in advance.
        worker_start: how worker processes start; "fork" is fastest, the others share no state.
        decoder: JPEG decoder; "auto" uses simplejpeg if it is installed. Both give the same pixels.
        draft: decode JPEGs at 1/2, 1/4 or 1/8 size where the crop stays at least as large as the
            output. Up to twice as fast on large photographs; changes the pixels slightly.
        max_pixels: images with more pixels count as bad samples and are not decoded. At most
            Pillow's own limit, which holds for the whole process and every decoder.
        max_bad_share: the run stops when clearly more than this fraction of the distinct samples
            seen is bad (see `data.bad.BadCounter`); 0 stops at the first.
        shuffle_window: shards (when streaming, hundreds of samples of a lane) shuffled together.
        verify_checksums: compare each shard with the SHA-256 of its manifest while indexing.
        index_dir: where the index of local shards is cached; None is the run's folder.
        allow_pipe: allow `pipe:` URLs, which run shell commands.
        lanes: streaming only: independent sequences of shards, a multiple of ranks x workers and a
            divisor of the global batch size. It decides the order of the samples, so keep it over
            a run. Arms with ranks of their own have their share of the lanes each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    augmentation: AugmentationConfig | Literal["none"] = AugmentationConfig()
    workers: NonNegativeInt = 2
    prefetch: PositiveInt = 2
    worker_start: Literal["fork", "forkserver", "spawn"] = "fork"
    decoder: Literal["auto", "pil", "simplejpeg"] = "auto"
    draft: bool = False
    max_pixels: Annotated[int, Field(gt=0, le=_PILLOW_MAX_PIXELS)] = MAX_PIXELS
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = 0.001
    shuffle_window: PositiveInt = 16
    verify_checksums: bool = False
    index_dir: Path | None = None
    allow_pipe: bool = False
    lanes: PositiveInt = 8

    @property
    def crops(self) -> list[int | None]:
        """Different crops of an image of each source; None where every epoch has another."""
        plain = self.augmentation == "none"
        return [1 if plain else source.crops for source in self.sources]

    @property
    def crop_facts(self) -> dict[str, Any]:
        """What decides the crops, JSON-able."""
        facts: dict[str, Any] = {"augmentation": self.model_dump(mode="json")["augmentation"]}
        if any(source.crops for source in self.sources) and self.augmentation != "none":
            facts["crops"] = self.crops
        return facts
