"""FeatSharp put together: what its inputs are, where tiles go, what it costs and what it learns."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.featsharp import FeatSharp
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.resize import resize
from teachers.upsamplers.tile import join_tiles, split_tiles
from tests.doubles import DIM, SPEC, Curved

GRID = (3, 5)


def build(factor: Any = 2, *, seed: int = 0, **options: Any) -> FeatSharp:
    torch.manual_seed(seed)
    options = {"inputs": ["jbu", "tiles"], "num_heads": 4} | options
    config = parse_upsampler({"kind": "featsharp", "factor": factor, **options})
    assert config is not None
    upsampler = build_upsampler(config, SPEC)
    assert isinstance(upsampler, FeatSharp)
    return upsampler


def awake(upsampler: FeatSharp) -> FeatSharp:
    """Away from its start, where it returns its first input."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in upsampler.named_parameters():
            if name.endswith(("attention_scale", "mlp_scale", "tile_position")):
                parameter.normal_()
    return upsampler


def image(batch: int, factor: Sequence[int] = (2, 2), seed: int = 0) -> Tensor:
    size = (12 * factor[0], 20 * factor[1])
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"inputs": ["jafar", "tiles"], "norm": False},
    {"inputs": ["bilinear", "tiles", "rgb"]},
    {"inputs": ["tiles", "jbu"], "window": 3},
    {"inputs": ["jbu", "rgb"], "position": "rope", "window": 5},
    {"inputs": ["jbu"], "norm": False},
    {"inputs": ["tiles"], "position": "rope"},
    {"inputs": ["bilinear", "jbu", "jafar", "tiles", "rgb"]},
]


@torch.no_grad()
def test_a_mean_residual_starts_from_the_mean_of_the_feature_maps() -> None:
    options: dict[str, Any] = {"inputs": ["bilinear", "rgb", "tiles"], "layer_scale": 0.0}
    teacher, images = Curved(), image(2)
    parts = [build(inputs=[name], layer_scale=0.0) for name in ("bilinear", "tiles")]
    bilinear, tiles = (part(images, teacher).high.spatial for part in parts)
    came = build(**options, residual="mean")(images, teacher).high.spatial
    torch.testing.assert_close(came, (bilinear + tiles) / 2)
    assert torch.equal(build(**options)(images, teacher).high.spatial, bilinear)


@pytest.mark.parametrize("factor", [(2, 2), (2, 3)])
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@torch.no_grad()
def test_with_layer_scales_of_zero_it_is_its_first_input_bit_for_bit(
    options: dict[str, Any], factor: tuple[int, int]
) -> None:
    teacher, upsampler, images = Curved(), build(factor, **options), image(2, factor)
    for scale in (upsampler.fusion.attention_scale, upsampler.fusion.mlp_scale):
        nn.init.zeros_(scale)
    low, high = upsampler(images, teacher)
    size = (GRID[0] * factor[0], GRID[1] * factor[1])
    assert torch.equal(low.spatial, teacher(resize(images, SPEC.resolution)).spatial)
    first = upsampler.inputs[0]
    if first == "jbu":
        due = upsampler.jbu(low.spatial, guidance(images, size))
    elif first == "jafar":
        due = upsampler.jafar(images, teacher).high.spatial
    elif first == "tiles":
        due = join_tiles(teacher(split_tiles(images, factor)).spatial, factor)
    else:
        due = F.interpolate(low.spatial, size, mode="bilinear")
    assert high.spatial.shape == (2, DIM, *size)
    assert torch.equal(high.spatial, due)


@torch.no_grad()
def test_a_fresh_one_is_its_first_input_to_a_ten_thousandth() -> None:
    """With the paper's start of LayerScale."""
    teacher, upsampler, images = Curved(), build(layer_scale=1e-6), image(2)
    low, high = upsampler(images, teacher)
    first = upsampler.jbu(low.spatial, guidance(images, (6, 10)))
    off = (high.spatial - first).abs().max()
    assert 0 < off < 1e-4 * first.std()


@pytest.mark.parametrize(
    "factor, options, due",
    [
        (1, {}, 1),
        (2, {}, 5),
        (3, {}, 10),
        ([2, 3], {}, 7),
        ([1, 2], {}, 3),
        (3, {"inputs": ["jbu", "rgb"]}, 1),
        (3, {"inputs": ["jafar", "tiles"]}, 10),
    ],
)
@torch.no_grad()
def test_it_costs_the_encoder_passes_it_says_in_one_call(
    factor: Any, options: dict[str, Any], due: int
) -> None:
    teacher, upsampler = Curved(), awake(build(factor, **options))
    high = upsampler(image(2, upsampler.factor), teacher).high
    assert upsampler.num_forwards == due
    assert teacher.batches == [2 * due]
    assert high.spatial.shape[-2:] == (GRID[0] * upsampler.factor[0], GRID[1] * upsampler.factor[1])


@torch.no_grad()
def test_factor_1_gives_the_fusion_the_same_map_as_both_of_its_inputs() -> None:
    teacher, upsampler, images = Curved(), awake(build(1)), image(2, (1, 1))
    low, high = upsampler(images, teacher)
    tiles = low.spatial + upsampler.tile_position
    torch.testing.assert_close(high.spatial, upsampler.fusion([low.spatial, tiles]))
    assert (high.spatial - low.spatial).abs().max() > 0.1


@torch.no_grad()
def test_the_position_of_a_tile_reaches_the_cells_of_that_tile_only() -> None:
    """Seen at the input of the fusion, whose attention would spread it."""
    teacher, upsampler, images = Curved(), build((2, 3)), image(1, (2, 3))
    seen: list[Tensor] = []
    upsampler.fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][1]))
    upsampler(images, teacher)
    h, w = GRID
    for i in range(2):
        for j in range(3):
            nn.init.zeros_(upsampler.tile_position)
            upsampler.tile_position[:, i, j] = torch.arange(1.0, DIM + 1)
            upsampler(images, teacher)
            due = torch.zeros(1, DIM, 2 * h, 3 * w)
            due[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w] = torch.arange(1.0, DIM + 1)[
                :, None, None
            ]
            torch.testing.assert_close(seen.pop() - seen[0], due)


@torch.no_grad()
def test_each_input_of_the_fusion_is_what_its_name_says() -> None:
    names = ["bilinear", "jbu", "jafar", "tiles", "rgb"]
    teacher, upsampler, images = Curved(), awake(build((2, 3), inputs=names)), image(2, (2, 3))
    seen: list[Sequence[Tensor]] = []
    upsampler.fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    low = upsampler(images, teacher).low.spatial
    smooth, jbu, jafar, tiles, rgb = seen[0]
    colours = guidance(images, (6, 15))
    position = upsampler.tile_position.repeat_interleave(3, 1).repeat_interleave(5, 2)
    stitched = join_tiles(teacher(split_tiles(images, (2, 3))).spatial, (2, 3))
    torch.testing.assert_close(smooth, F.interpolate(low, (6, 15), mode="bilinear"))
    torch.testing.assert_close(jbu, upsampler.jbu(low, colours))
    torch.testing.assert_close(jafar, upsampler.jafar.dense(low, images))
    torch.testing.assert_close(tiles, stitched + position)
    due = torch.einsum("oc,bchw->bohw", upsampler.rgb.weight, colours)
    assert upsampler.rgb.bias is not None
    torch.testing.assert_close(rgb, due + upsampler.rgb.bias[:, None, None])


@pytest.mark.parametrize("inputs", [["jbu", "tiles"], ["jafar", "rgb"]])
@torch.no_grad()
def test_the_summary_is_that_of_the_shrunk_whole_image(inputs: list[str]) -> None:
    teacher, upsampler, images = Curved(), awake(build((2, 3), inputs=inputs)), image(3, (2, 3))
    low, high = upsampler(images, teacher)
    due = teacher(F.interpolate(images, (12, 20), mode="bilinear", antialias=True)).summary
    assert due is not None
    torch.testing.assert_close(low.summary, due)
    torch.testing.assert_close(high.summary, due)
    torch.testing.assert_close(UpsampledTeacher(teacher, upsampler)(images).summary, due)


@pytest.mark.parametrize("options", COMBINATIONS[:3], ids=str)
@torch.no_grad()
def test_an_image_does_not_know_the_others_in_its_batch(options: dict[str, Any]) -> None:
    teacher, upsampler, images = Curved(), awake(build(**options)).double(), image(5).double()
    teacher.double()

    def encode(batch: Tensor) -> Features:  # Teacher.forward would round to float32
        return teacher.extract(batch)

    together = upsampler(images, encode).high.spatial
    for n in (1, 3, 5, 2):  # batches may grow and shrink
        alone = upsampler(images[:n], encode).high.spatial
        torch.testing.assert_close(alone, together[:n], rtol=1e-12, atol=1e-12)
    swapped = upsampler(images.flip(0), encode).high.spatial
    torch.testing.assert_close(swapped, together.flip(0), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_images_of_any_size_and_shape_are_resized_to_what_it_needs() -> None:
    teacher, upsampler = Curved(), awake(build((2, 3)))
    images = torch.rand(2, 3, 50, 41)
    high = upsampler(images, teacher).high.spatial
    assert high.shape == (2, DIM, 6, 15)
    assert high.isfinite().all()


@pytest.mark.parametrize("options", COMBINATIONS[:5], ids=str)
@torch.no_grad()
def test_autocast_in_bfloat16_stays_close_to_float32(options: dict[str, Any]) -> None:
    teacher, upsampler, images = Curved(), awake(build(**options)), image(2)
    whole = upsampler(images, teacher).high.spatial
    with torch.autocast("cpu", torch.bfloat16):
        half = upsampler(images, teacher).high.spatial
    assert 1e-5 < (half.float() - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize("factor", [1, [2, 3]])
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_every_parameter_gets_a_gradient(options: dict[str, Any], factor: Any) -> None:
    teacher, upsampler = Curved(), awake(build(factor, **options))
    upsampler(image(2, upsampler.factor), teacher).high.spatial.square().sum().backward()
    without = [n for n, p in upsampler.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_at_the_start_the_first_input_and_the_layer_scales_learn_and_the_rest_wakes_up() -> None:
    teacher, upsampler, images = Curved(), build(), image(2)
    before = {name: p.detach().clone() for name, p in upsampler.named_parameters()}
    optimizer = torch.optim.Adam(upsampler.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        upsampler(images, teacher).high.spatial.square().mean().backward()
        optimizer.step()
    still = [name for name, p in upsampler.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inputs": ["jbu", "tiles", "jbu"]}, r"inputs: .*'jbu', 'tiles', 'jbu'\] names an inp"),
        ({"inputs": ["rgb", "tiles"]}, "inputs: the first input is the residual path and must not"),
        ({"inputs": ["jbu", "tyles"]}, r"inputs\.1: .*'tiles'.*got 'tyles'"),
        ({"inputs": []}, "inputs: .*at least 1 item"),
        ({"window": 0}, "window: .*greater than 0, got 0"),
        ({"position": "learned"}, "position: .*'alibi' or 'rope', got 'learned'"),
        ({"windw": 3}, r"windw: unknown key \(did you mean 'window'\?\)"),
        ({"window": 4}, "window: expected an odd number of cells, such as 7, got 4"),
        ({"num_heads": 5}, "num_heads: 5 heads do not divide the 16 channels .* is 4"),
    ],
)
def test_a_wrong_option_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build(**options)


def test_the_factor_is_needed() -> None:
    with pytest.raises(TeacherError, match="factor: required"):
        parse_upsampler({"kind": "featsharp"})
