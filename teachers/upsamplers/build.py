"""From a recipe's `upsampler:` entry to an upsampler."""

from os import PathLike
from typing import Any

from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.upsamplers.kinds import UPSAMPLERS
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig

UPSAMPLERS.register("trained", "teachers.upsamplers.trained:TrainedUpsampler")


def parse_upsampler(value: Any) -> UpsamplerConfig | None:
    """The config of an upsampler; None stays None.

    Args:
        value: a mapping with a `kind`, or the path or name of a trained upsampler.

    Raises:
        TeacherError: unknown kind or key, or a wrong value.
    """
    if isinstance(value, (str, PathLike)):
        value = {"kind": "trained", "path": value}
    return None if value is None else UPSAMPLERS.parse(value)


def parse_upsamplers(value: Any) -> UpsamplerConfig | tuple[UpsamplerConfig, ...] | None:
    """One upsampler's config, or a tuple of configs where a recipe has a list.

    Raises:
        TeacherError: as `parse_upsampler`, or a list that is empty or holds nothing.
    """
    if not isinstance(value, (list, tuple)):
        return parse_upsampler(value)
    parsed = [parse_upsampler(each) for each in value]
    configs = tuple(config for config in parsed if config is not None)
    if not configs or len(configs) < len(parsed):
        raise TeacherError(f"upsampler: expected a list of upsamplers, got {value!r}")
    return configs


def build_upsampler(config: UpsamplerConfig, spec: FeatureSpec) -> Upsampler:
    """Builds the upsampler of an encoder with `spec`."""
    return UPSAMPLERS.resolve(config.kind).from_config(config, spec)
