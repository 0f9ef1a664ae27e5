"""What recipes of depth and of normals have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data.labelled.depth import AnyDepth
from data.labelled.depth_files import Window
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.evaluation.probe_training import ProbeConfig
from teachers.upsamplers.resize import Factor


class LinearHeadConfig(BaseModel):
    """BatchNorm and a 1 x 1 convolution on the encoder's map."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"]


class DPTHeadConfig(BaseModel):
    """A DPT on four layers; an encoder that shows none, an upsampled one say, cannot have it.

    Attributes:
        hidden_dim: channels of the head.
        layers: numbers of the four; None for the last ones of four even parts of the encoder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dpt"]
    hidden_dim: PositiveInt = 256
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=4, max_length=4)] | None = None


class GeometryInput(BaseModel):
    """What an encoder gets to see.

    Attributes:
        size: (height, width) in pixels that images, of training and of test, are resized to;
            `native` for the encoder's own resolution; None for images as they are.
        window: the part of training images that is trained on; None for all of them.
        crop: (height, width) in pixels of the random crops of that part, on-line; None for none.
        flip: whether half of the training images are mirrored, on-line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Factor | Literal["native"] | None = None
    window: Window | None = None
    crop: Factor | None = None
    flip: bool = True


class GeometryConfig(BenchmarkConfig):
    """A probe of depth or of normals.

    Attributes:
        dataset: where it lies, and in which layout.
        input: what the encoder sees.
        probe: how the head is trained.
        head: `linear` on the last map or `dpt` on four layers.
        loss_stride: the loss is taken at every n-th pixel along both axes.
        counted: the part of test images that counts, such as Eigen's crop; None for all of them.
        labels: (height, width) that the truth of test images is resized to before it is counted;
            None for its own size.
        flip_average: whether predictions are means of the image's and its mirror image's.
    """

    dataset: AnyDepth
    input: GeometryInput = GeometryInput()
    probe: ProbeConfig
    head: Annotated[LinearHeadConfig | DPTHeadConfig, Field(discriminator="kind")]
    loss_stride: PositiveInt = 1
    counted: Window | None = None
    labels: Factor | None = None
    flip_average: bool = False
