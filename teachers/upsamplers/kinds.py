"""The kinds of upsamplers that a recipe or the card of a trained upsampler may name.

`trained` is none of them: a card holds the kind that was trained. `teachers.upsamplers.build`
registers it, because `teachers.upsamplers.trained` imports this module.
"""

from teachers.kinds import Registry
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig

UPSAMPLERS = Registry(
    noun="upsampler",
    table={
        "anyup": "teachers.upsamplers.anyup:AnyUp",
        "bilinear": "teachers.upsamplers.bilinear:Bilinear",
        "featsharp": "teachers.upsamplers.featsharp:FeatSharp",
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
