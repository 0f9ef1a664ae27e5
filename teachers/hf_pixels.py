"""What a repository or directory of transformers states of the pixels that its model takes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from teachers.errors import TeacherError
from teachers.messages import say_once, took
from teachers.pixels import Pixels

_FILES = ("processor_config.json", "preprocessor_config.json")  # transformers reads the first
_KEYS = (
    *("do_normalize", "image_mean", "image_std"),
    *("do_rescale", "rescale_factor", "rescale_offset", "do_flip_channel_order"),
)


class Preprocessing(NamedTuple):
    """What is stated of the pixels.

    Attributes:
        source: the file or repository, in words.
        stated: `mean` and `std` for images in [0, 1], as far as they are stated.
        assumed: what transformers takes for the others, with its origin; None if unknown.
        flips: whether the model takes blue first.
        size: (height, width) in pixels of its images; None if it is not stated.
    """

    source: str
    stated: dict[str, list[float]]
    assumed: tuple[Pixels, str] | None
    flips: bool
    size: tuple[int, int] | None


def read_preprocessing(
    transformers: Any, model: str, fetched: Callable[[str, Callable[[], Any]], Any]
) -> Preprocessing:
    """Reads the config of the image processor of a model.

    Args:
        transformers: the library.
        model: a repository or a directory.
        fetched: runs a function that reads it and turns its errors into a TeacherError.

    Raises:
        TeacherError: there is no such config, or it asks for what is not supported.
    """
    mixin = transformers.image_processing_base.ImageProcessingMixin
    stored, _ = fetched(_FILES[1], lambda: mixin.get_image_processor_dict(model))
    if not isinstance(stored, Mapping):
        raise TeacherError(f"model: the {_FILES[1]} of {model}: expected a mapping, got {stored!r}")
    source = f"the {_file(model)} of {model}"
    kind = stored.get("image_processor_type") or stored.get("feature_extractor_type")
    defaults = _defaults(transformers, model) if kind else {}
    options = {key: stored[key] if key in stored else defaults.get(key) for key in _KEYS}
    if kind is None and "do_normalize" not in stored:
        options["do_normalize"] = True
    scale, shift = _scale(options, source), 1.0 if options["rescale_offset"] else 0.0
    flips = bool(options["do_flip_channel_order"])
    if not options["do_normalize"]:
        pixels = _for_unit_images([0.0] * 3, [1.0] * 3, scale, shift)
        size = _size(stored)
        return Preprocessing(source, {"mean": pixels[0], "std": pixels[1]}, None, flips, size)
    if flips:
        raise TeacherError(
            f"model: {source} asks for do_flip_channel_order and do_normalize, which is not "
            "supported together"
        )
    mean, std = (_three(options[key]) for key in ("image_mean", "image_std"))
    if mean is not None and std is not None:
        mean, std = _for_unit_images(mean, std, scale, shift)
    pairs = {"mean": (mean, "image_mean"), "std": (std, "image_std")}
    stated = {key: value for key, (value, name) in pairs.items() if value and name in stored}
    assumed = (Pixels(mean, std), f"the default of {kind}") if mean and std else None
    return Preprocessing(source, stated, assumed, flips, _size(stored))


def _file(model: str) -> str:
    """The file that transformers reads; says which, where a directory has both."""
    here = [name for name in _FILES if (Path(model) / name).is_file()]
    if _FILES[0] in here and b'"image_processor"' in (Path(model) / _FILES[0]).read_bytes():
        took(f"hf {model}: preprocessing", _FILES[0], here, "transformers' choice")
        return _FILES[0]
    return _FILES[1]


def choose_size(
    model: str, own: Any, preprocessing: Preprocessing, asked: tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) in pixels: the entry's, the architecture's, or the preprocessing's.

    Args:
        model: as in the entry.
        own: the `image_size` of the model's config; None if it has none.
        preprocessing: of the same model.
        asked: the entry's `resolution`.

    Raises:
        TeacherError: none of them states a size.
    """
    if asked is not None:
        return asked
    if own is None:
        if preprocessing.size is None:
            raise TeacherError(
                f"resolution: missing; the config of {model} has no image_size, so give the "
                "(height, width) in pixels to run at"
            )
        return preprocessing.size
    native = (own, own) if isinstance(own, int) else (own[0], own[1])
    if preprocessing.size not in (None, native):
        say_once(
            f"hf {model}: resolution {list(native)}, the image_size of its config, is taken; "
            f"{preprocessing.source} states {list(preprocessing.size or ())}; set resolution for "
            "another"
        )
    return native


def _defaults(transformers: Any, model: str) -> Mapping[str, Any]:
    """What the image processor's class takes for keys that its config leaves out."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except Exception:  # a class of a later transformers, or of code that is not run
        return {"do_normalize": True}
    return {key: getattr(processor, key, None) for key in _KEYS}


def _scale(options: Mapping[str, Any], source: str) -> float:
    """What images in [0, 1] are multiplied by; transformers starts from 0..255."""
    if options["do_rescale"] is False:
        return 255.0
    factor = options["rescale_factor"]
    if factor is not None and not (isinstance(factor, int | float) and factor > 0):
        raise TeacherError(f"model: {source}: rescale_factor: expected above 0, got {factor!r}")
    scale = 1.0 if factor is None else 255.0 * factor
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _for_unit_images(
    mean: list[float], std: list[float], scale: float, shift: float
) -> tuple[list[float], list[float]]:
    """Mean and std of images in [0, 1], where the stated ones follow `scale * image - shift`."""
    if (scale, shift) == (1.0, 0.0):
        return mean, std
    return [(each + shift) / scale for each in mean], [each / scale for each in std]


def _three(value: Any) -> Any:
    return (
        None if value is None else list(value) if isinstance(value, list | tuple) else [value] * 3
    )


def _size(stored: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size after resizing and cropping."""
    crops = stored.get("crop_size") is not None and stored.get("do_center_crop", True)
    size = stored.get("crop_size") if crops else stored.get("size")
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Mapping):
        return None
    if "shortest_edge" in size and isinstance(size["shortest_edge"], int):
        return size["shortest_edge"], size["shortest_edge"]
    height, width = size.get("height"), size.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
