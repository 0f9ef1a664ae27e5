"""A network of timm as the trunk of a student: what it is called, its levels, and how it is built.

A student takes images of any size in multiples of its stride, so a network that is made for one
size only, or for whole windows of attention, is refused. timm is imported where it is needed, as
that takes two seconds.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from student.errors import StudentError
from teachers.messages import did_you_mean

_BREAKS = (AssertionError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


class TimmLevel(NamedTuple):
    """A map that a network returns.

    Attributes:
        stride: pixels of the image along a side of a cell.
        channels: of the map.
    """

    stride: int
    channels: int


class TimmModel(NamedTuple):
    """What is known of a network without its weights.

    Attributes:
        levels: its maps, from fine to coarse: stages of a CNN, blocks of a ViT.
        summary_dim: channels of the vector that the network pools for its classifier.
        side: of the images that it was made for, in pixels.
        mean: pixel mean for images in [0, 1], of the weights that its name stands for.
        std: pixel standard deviation of the same.
    """

    levels: tuple[TimmLevel, ...]
    summary_dim: int
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def coarsest(self) -> int:
        """The largest stride, in pixels."""
        return max(level.stride for level in self.levels)

    def describe_levels(self) -> str:
        """The levels in words: `0 to 3 (strides 4, 8, 16, 32)`."""
        strides = list(dict.fromkeys(level.stride for level in self.levels))
        last = len(self.levels) - 1
        many = "strides" if len(strides) > 1 else "stride"
        return f"0 to {last} ({many} {', '.join(map(str, strides))})"


@cache
def timm_model(model: str) -> TimmModel:
    """Describes a network of timm, by a pass without storage.

    Raises:
        StudentError: timm has no such model, or it cannot be the trunk of a student.
    """
    network = _without_storage(model)
    cfg: Any = network.pretrained_cfg
    info = network.feature_info
    largest = max(int(each["reduction"]) for each in info)
    try:
        maps, pooled = _maps_of(network, 4 * largest, 2 * largest)
        _maps_of(network, 3 * largest, 5 * largest)
        levels = tuple(TimmLevel(4 * largest // m.shape[2], m.shape[1]) for m in maps)
        odd = [m for m, each in zip(maps, levels, strict=True) if not _is_grid(m, each, largest)]
    except _BREAKS as error:
        raise StudentError(
            f"model: timm's {model!r} takes images of some sizes only "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); a student "
            "takes any multiple of its stride. Choose a CNN, a Swin or a plain ViT"
        ) from None
    if odd or pooled.ndim != 2:
        what = "maps whose strides are no whole numbers" if odd else "no pooled vector"
        raise StudentError(f"model: timm's {model!r} returns {what}; choose another model")
    side = -(-int(cfg["input_size"][-1]) // largest) * largest
    return TimmModel(levels, pooled.shape[1], side, tuple(cfg["mean"]), tuple(cfg["std"]))


def build_network(model: str, drop_path: float = 0.0, **options: Any) -> Any:
    """A network of timm without its classifier, for images of any size.

    Args:
        model: timm's name of it, with or without a tag.
        drop_path: probability that a residual block is left out, for an image, in training.
        options: further ones of `timm.create_model`.

    Raises:
        StudentError: timm has no such model, or it returns no maps, or has no such option.
    """
    import timm

    _check_name(model)
    options = {"num_classes": 0, **options}
    rate = {"drop_path_rate": drop_path}
    tried: list[dict[str, Any]] = [{"dynamic_img_size": True, **rate}, rate]
    if not drop_path:
        tried += [{"dynamic_img_size": True}, {}]
    for extra in tried:
        try:
            network: Any = timm.create_model(model, **options, **extra)
        except TypeError as error:  # a class of timm that has no such option
            reason = error
            continue
        if not hasattr(network, "forward_intermediates"):
            raise StudentError(f"model: timm returns no maps of {model!r}")
        network.reset_classifier(0)
        return network
    key = "drop_path" if drop_path else "model"
    raise StudentError(f"{key}: timm's {model!r}: {reason}")


def _without_storage(model: str) -> Any:
    # A generator of its own: what is built afterwards must draw the same numbers, cached or not.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_network(model).eval()


def _maps_of(network: Any, height: int, width: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    images = torch.empty(2, 3, height, width, device="meta")
    final, maps = network.forward_intermediates(images, norm=True, output_fmt="NCHW")
    return maps, network.forward_head(final, pre_logits=True)


def _is_grid(found: torch.Tensor, level: TimmLevel, largest: int) -> bool:
    cells = found.shape[2] * level.stride, found.shape[3] * level.stride
    return cells == (4 * largest, 2 * largest)


def _check_name(model: str) -> None:
    import timm

    if not timm.is_model(model):
        hint = did_you_mean(model.split(".")[0], timm.list_models())
        raise StudentError(f"model: timm has no model {model!r}{hint}; see timm.list_models()")
    if "." in model:
        try:
            timm.get_pretrained_cfg(model)
        except RuntimeError:
            tags = list(_tags(model.partition(".")[0]))
            raise StudentError(
                f"model: timm has no tag of {model!r}{did_you_mean(model, tags)}; choose "
                f"one of {', '.join(tags) or 'none'}"
            ) from None


def _tags(architecture: str) -> Iterator[str]:
    import timm

    yield from timm.list_models(f"{architecture}.*", pretrained=True)
