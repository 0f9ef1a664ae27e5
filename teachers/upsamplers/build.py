"""From a recipe's `upsampler:` entry to an upsampler."""

from typing import Any

from teachers.features import FeatureSpec
from teachers.kinds import Family
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig

UPSAMPLERS = Family(
    noun="upsampler",
    table={
        "anyup": "teachers.upsamplers.anyup:AnyUp",
        "bilinear": "teachers.upsamplers.bilinear:Bilinear",
        "featup": "teachers.upsamplers.featup:FeatUp",
        "jafar": "teachers.upsamplers.jafar:JAFAR",
        "resfu": "teachers.upsamplers.resfu:ReSFU",
        "s2": "teachers.upsamplers.s2:S2",
        "sapa": "teachers.upsamplers.sapa:SAPA",
        "tile": "teachers.upsamplers.tile:Tile",
    },
    base=Upsampler,
    config=UpsamplerConfig,
)


def parse_upsampler(value: Any) -> UpsamplerConfig | None:
    """The config of the upsampler that `kind` names; None stays None.

    Raises:
        TeacherError: unknown kind or key, wrong value.
    """
    return None if value is None else UPSAMPLERS.parse(value)


def build_upsampler(config: UpsamplerConfig, spec: FeatureSpec) -> Upsampler:
    """Builds the upsampler of an encoder with `spec`."""
    return UPSAMPLERS.resolve(config.kind).from_config(config, spec)
