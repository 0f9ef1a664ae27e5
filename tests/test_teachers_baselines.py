"""The baseline upsamplers against slow statements of their formulas, and what all of them keep."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers import anyup, jafar
from teachers.upsamplers.anyup import AnyUp, ChannelSignature
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.guidance_encoder import (
    DIM,
    GuidanceEncoder,
    ResidualBlock,
    RotaryCoordinates,
    read_size,
)
from teachers.upsamplers.jafar import JAFAR, chunked_attention, mean_attention
from teachers.upsamplers.resfu import GuidedFilter, ReSFU
from teachers.upsamplers.s2 import S2
from teachers.upsamplers.sapa import SAPA
from teachers.upsamplers.upsampler import Upsampler
from tests.doubles import Patches

SPEC = FeatureSpec(summary_dim=None, spatial_dim=5, patch_size=4, resolution=(16, 24))
WITH_SUMMARY = replace(SPEC, summary_dim=3)
LOW, FACTOR, HIGH = (4, 6), (2, 3), (8, 18)
GUIDED = ["sapa", "resfu", "jafar", "anyup"]


def build(kind: str, factor: tuple[int, int] = FACTOR, **options: object) -> Upsampler:
    torch.manual_seed(0)
    config = parse_upsampler({"kind": kind, "factor": factor, **options})
    assert config is not None
    return build_upsampler(config, SPEC).double()


def inputs(batch: int = 2, seed: int = 0, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, dim, *LOW, generator=generator, dtype=torch.float64)
    images = torch.rand(batch, 3, 40, 54, generator=generator, dtype=torch.float64)
    return features, images


def dense(upsampler: Upsampler, features: Tensor, images: Tensor) -> Tensor:
    return upsampler(images, lambda _: Features(None, features)).high.spatial


class Watch(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returns, and softmax's dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.softmax = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        if func is torch.ops.aten._softmax.default:
            self.softmax.add(out.dtype)
        return out


# s2


def test_s2_is_one_part_interpolated_map_and_four_parts_tiles() -> None:
    teacher, images = Patches(WITH_SUMMARY), torch.rand(2, 3, 32, 72)
    mixed = UpsampledTeacher(teacher, S2.from_config(S2.Config(kind="s2", factor=FACTOR), SPEC))
    low, high = mixed.upsample(images)
    smooth = F.interpolate(low.spatial, HIGH, mode="bilinear")
    torch.testing.assert_close(
        high.spatial, 0.2 * smooth + 0.8 * teacher.net((images - teacher.mean) / teacher.std)
    )
    torch.testing.assert_close(high.summary, low.summary)
    assert mixed.upsampler.num_forwards == 7


def test_s2_concatenated_promises_and_returns_both_maps_side_by_side() -> None:
    teacher, images = Patches(WITH_SUMMARY), torch.rand(2, 3, 32, 72)
    config = parse_upsampler({"kind": "s2", "factor": FACTOR, "beta": None})
    assert config is not None
    joined = UpsampledTeacher(teacher, build_upsampler(config, teacher.spec))
    assert joined.spec.spatial_dim == 10
    high = joined(images).spatial
    low = joined.upsample(images).low.spatial
    torch.testing.assert_close(high[:, :5], F.interpolate(low, HIGH, mode="bilinear"))
    torch.testing.assert_close(high[:, 5:], teacher.net((images - teacher.mean) / teacher.std))


def test_s2_refuses_a_weight_beyond_one_and_survives_a_dump() -> None:
    config = parse_upsampler({"kind": "s2", "factor": 2, "beta": None})
    assert config is not None
    assert parse_upsampler(config.model_dump(mode="json")) == config
    with pytest.raises(TeacherError, match=r"^beta: .* less than or equal to 1, got 1.5"):
        parse_upsampler({"kind": "s2", "factor": 2, "beta": 1.5})


# what all image-guided ones keep


@pytest.mark.parametrize("kind", GUIDED)
def test_the_output_is_a_convex_combination_of_the_features(kind: str) -> None:
    features, images = inputs()
    upsampler = build(kind)
    high = dense(upsampler, features, images)
    assert high.shape == (2, 5, *HIGH)
    assert upsampler.num_forwards == 1
    least, most = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert ((high >= least - 1e-12) & (high <= most + 1e-12)).all()
    constant = torch.tensor([3.0, -1, 0, 2, 5], dtype=torch.float64).view(1, 5, 1, 1)
    kept = dense(upsampler, constant.expand(2, 5, *LOW), images)
    torch.testing.assert_close(kept, constant.expand(2, 5, *HIGH))


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("factor", [(1, 1), (1, 4), (3, 2)])
def test_factors_are_per_axis_and_images_of_any_size(kind: str, factor: tuple[int, int]) -> None:
    features, _ = inputs(1)
    upsampler = build(kind, factor)
    for size in ((7, 5), (31, 90)):  # smaller than the output grid too
        images = torch.rand(1, 3, *size, dtype=torch.float64)
        assert dense(upsampler, features, images).shape == (1, 5, 4 * factor[0], 6 * factor[1])


@pytest.mark.parametrize("kind", GUIDED)
def test_a_grid_of_one_row_has_its_output_too(kind: str) -> None:
    features, images = inputs(1)
    high = dense(build(kind), features[:, :, :1], images)
    assert high.shape == (1, 5, 2, 18)
    assert high.isfinite().all()


@pytest.mark.parametrize("kind", GUIDED)
def test_gradients_reach_every_parameter(kind: str) -> None:
    features, images = inputs()
    upsampler = build(kind)
    dense(upsampler, features, images).square().mean().backward()
    for name, parameter in upsampler.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", GUIDED)
def test_gradients_of_features_and_image_are_those_of_finite_differences(kind: str) -> None:
    features, images = inputs(1)
    upsampler = build(kind).requires_grad_(False)
    points = (features.requires_grad_(), images.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda f, x: dense(upsampler, f, x), points, fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize("kind", GUIDED)
def test_an_image_does_not_feel_the_others_in_its_batch(kind: str) -> None:
    features, images = inputs(3)
    upsampler = build(kind)
    alone = dense(upsampler, features[1:2], images[1:2])
    torch.testing.assert_close(dense(upsampler, features, images)[1:2], alone)


@pytest.mark.parametrize("kind", GUIDED)
def test_under_autocast_every_softmax_is_in_float32_and_little_changes(kind: str) -> None:
    features, images = (tensor.float() for tensor in inputs())
    upsampler = build(kind).float()
    with Watch() as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        high = dense(upsampler, features, images)
    assert watch.softmax == {torch.float32}
    assert (high - dense(upsampler, features, images)).abs().mean() < 0.02 * features.std()


@pytest.mark.parametrize("kind", [*GUIDED, "s2"])
def test_a_teacher_cast_to_half_precision_takes_its_upsampler_along(kind: str) -> None:
    teacher, images = Patches(WITH_SUMMARY), torch.rand(1, 3, 32, 72)
    upsampled = UpsampledTeacher(teacher, build(kind).float())
    due = upsampled(images).spatial
    came = upsampled.cast(torch.bfloat16)(images).spatial
    assert came.dtype == torch.float32
    assert (came - due).abs().mean() < 0.05 * due.std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", GUIDED)
def test_a_gpu_gives_what_the_cpu_gives(kind: str) -> None:
    features, images = inputs()
    upsampler = build(kind)
    due = dense(upsampler, features, images)
    came = dense(upsampler.cuda(), features.cuda(), images.cuda())
    torch.testing.assert_close(came.cpu(), due)


# sapa


def test_sapa_weights_each_cell_by_the_softmax_of_its_inner_products() -> None:
    features, images = inputs()
    upsampler = build("sapa")
    assert isinstance(upsampler, SAPA)
    q = torch.einsum("ec,bcyx->byxe", upsampler.query.weight[:, :, 0, 0], guidance(images, HIGH))
    q = q + upsampler.query.bias
    centred = features - features.mean(1, keepdim=True)
    normal = centred / (features.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    k = torch.einsum("ec,bcyx->byxe", upsampler.key.weight, normal)
    due = torch.zeros(2, 5, *HIGH, dtype=torch.float64)
    for b, y, x in product(range(2), range(HIGH[0]), range(HIGH[1])):
        cells = [
            (i, j)
            for i, j in product(range(LOW[0]), range(LOW[1]))
            if abs(i - y // FACTOR[0]) <= 2 and abs(j - x // FACTOR[1]) <= 2
        ]
        weights = torch.stack([q[b, y, x] @ k[b, i, j] for i, j in cells]).softmax(0)
        due[b, :, y, x] = sum(
            w * features[b, :, i, j] for w, (i, j) in zip(weights, cells, strict=True)
        )
    torch.testing.assert_close(dense(upsampler, features, images), due)


# resfu


def between(maps: Tensor, y: float, x: float) -> Tensor:
    """(D, h, w) at a place between its cells, by the definition of linear interpolation."""
    h, w = maps.shape[-2:]
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    rows = [max(0.0, 1 - abs(y - i)) for i in range(h)]
    columns = [max(0.0, 1 - abs(x - j)) for j in range(w)]
    weights = torch.outer(maps.new_tensor(rows), maps.new_tensor(columns))
    return (maps * weights).sum((1, 2))


def test_resfu_compares_every_interpolated_neighbour_with_the_query() -> None:
    features, images = inputs(1)
    upsampler = build("resfu")
    assert isinstance(upsampler, ReSFU)
    tokens = F.layer_norm(features.permute(0, 2, 3, 1), (5,))
    keys = (tokens @ upsampler.key.weight.T).permute(0, 3, 1, 2)
    queries = upsampler.align(upsampler.detail(guidance(images, HIGH)), keys, FACTOR)
    kernel, head = upsampler.difference, upsampler.logits
    due = torch.zeros(1, 5, *HIGH, dtype=torch.float64)
    for y, x in product(range(HIGH[0]), range(HIGH[1])):
        place_y = min(max((y + 0.5) / FACTOR[0] - 0.5, 0), LOW[0] - 1)
        place_x = min(max((x + 0.5) / FACTOR[1] - 0.5, 0), LOW[1] - 1)
        near = list(product((-1, 0, 1), (-1, 0, 1)))
        hidden = kernel.bias + sum(
            kernel.weight[:, :, i + 1, j + 1]
            @ (between(keys[0], place_y + i, place_x + j) - queries[0, :, y, x])
            for i, j in near
        )
        weights = (head.weight[:, :, 0, 0] @ F.silu(hidden) + head.bias).softmax(0)
        due[0, :, y, x] = sum(
            w * between(features[0], place_y + i, place_x + j)
            for w, (i, j) in zip(weights, near, strict=True)
        )
    torch.testing.assert_close(dense(upsampler, features, images), due)


@torch.no_grad()
def test_resfu_aligns_by_the_local_linear_fit_of_keys_to_guidance() -> None:
    guide, keys = torch.rand(2, 1, 1, 8, 18, dtype=torch.float64)[0], inputs(1)[0][:, :1]
    align = GuidedFilter(1).double()
    coarse = F.adaptive_avg_pool2d(guide, LOW)[0, 0]
    slope, offset = torch.zeros(2, *LOW, dtype=torch.float64)
    for i, j in product(range(LOW[0]), range(LOW[1])):
        window = (slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2))
        g, k = coarse[window].flatten(), keys[0, 0][window].flatten()
        gram = torch.stack([g - g.mean(), k - k.mean()]) / len(g) ** 0.5
        covariance = gram @ gram.T
        slope[i, j] = covariance[0, 1] / (covariance[0, 0] + align.log_epsilon.exp())
        offset[i, j] = k.mean() - slope[i, j] * g.mean()
    up = F.interpolate(torch.stack([slope, offset])[None], HIGH, mode="bilinear")[0]
    torch.testing.assert_close(align(guide, keys, FACTOR)[0, 0], up[0] * guide[0, 0] + up[1])


def test_resfu_starts_with_a_gaussian_where_it_sees_no_difference() -> None:
    upsampler = build("resfu")
    assert isinstance(upsampler, ReSFU)
    nn.init.zeros_(upsampler.logits.weight)
    kernel = torch.tensor([-1.0, 0, 1], dtype=torch.float64).square().div(-2).exp()
    due = torch.outer(kernel, kernel) / kernel.sum() ** 2
    weights = upsampler.weights(*inputs())
    torch.testing.assert_close(weights, due.expand(2, *HIGH, 3, 3))


# the guidance encoder of jafar and anyup


def test_the_image_is_read_at_twice_the_output_grid_at_most() -> None:
    assert read_size((384, 384), (108, 108)) == (216, 216)
    assert read_size((384, 150), (108, 108)) == (216, 150)
    assert read_size((50, 384), (108, 108)) == (108, 216)


def test_queries_and_keys_are_pooled_from_encoded_pixels() -> None:
    torch.manual_seed(0)
    guide, (_, images) = GuidanceEncoder().double(), inputs()
    queries, keys = guide(images, LOW, HIGH)
    maps = guide.rotary(guide.trunk(guidance(images, (16, 36))))
    pooled = F.avg_pool2d(guide.query(maps), 2)
    padded = F.pad(grouped(pooled), (1, 1, 1, 1), mode="replicate")
    torch.testing.assert_close(queries, F.conv2d(padded, guide.query_conv.weight))
    torch.testing.assert_close(keys, grouped(F.avg_pool2d(guide.key(maps), (4, 6))))


def grouped(maps: Tensor) -> Tensor:
    """Zero mean and unit variance over the 16 channels of a group, and over the map."""
    groups = maps.unflatten(1, (8, 16)).flatten(2)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
    return ((groups - mean) / (var + 1e-5).sqrt()).view_as(maps)


def test_a_residual_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = ResidualBlock().double()
    inner = maps = torch.randn(2, DIM, 3, 4, dtype=torch.float64)
    for norm, conv in zip(block.norms, block.convs, strict=True):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        scaled = grouped(inner) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        inner = torch.einsum("oc,bcyx->boyx", conv.weight[:, :, 0, 0], scaled * scaled.sigmoid())
        inner = inner + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(block(maps), maps + inner)


def test_rotary_pairs_are_complex_numbers_turned_by_their_position() -> None:
    rotary = RotaryCoordinates().double()
    nn.init.normal_(rotary.frequencies, std=9)
    maps = torch.randn(1, DIM, 3, 4, dtype=torch.float64)
    y = (torch.arange(3, dtype=torch.float64) + 0.5) / 3
    x = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    angles = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1) @ rotary.frequencies
    pairs = torch.complex(*maps.chunk(2, dim=1)) * torch.exp(1j * angles).permute(2, 0, 1)
    torch.testing.assert_close(rotary(maps), torch.cat([pairs.real, pairs.imag], 1))


def test_rotary_frequencies_start_geometric_with_half_of_the_pairs_for_each_axis() -> None:
    y, x = RotaryCoordinates().frequencies.detach() / (2 * torch.pi)
    torch.testing.assert_close(y[[0, 31]], torch.tensor([1, 0.01]))
    torch.testing.assert_close(x[32:], y[:32])
    assert not y[32:].any()
    assert not x[:32].any()


# jafar and anyup


def attention_weights(
    upsampler: JAFAR | AnyUp, queries: Tensor, keys: Tensor, mask: Tensor | None
) -> Tensor:
    """PyTorch's own attention: its weights (B, N, n), averaged over heads."""
    norms, linears = zip(upsampler.query, upsampler.key, strict=True)
    tokens = []
    for norm, maps in zip(norms, (queries, keys), strict=True):
        nn.init.normal_(norm.weight)
        flat = maps.flatten(2).transpose(1, 2)
        mean = flat.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps
        tokens.append(flat / mean.sqrt() * norm.weight)
    attention = nn.MultiheadAttention(DIM, 4, bias=False, batch_first=True).double()
    stacked = torch.cat([linears[0].weight, linears[1].weight, torch.zeros(DIM, DIM)])
    attention.in_proj_weight = nn.Parameter(stacked)
    return attention(*tokens, tokens[1], attn_mask=mask)[1]


def test_jafar_applies_the_heads_mean_weights_to_the_raw_features() -> None:
    features, images = inputs()
    upsampler = build("jafar")
    assert isinstance(upsampler, JAFAR)
    queries, keys = upsampler.guide(images, LOW, HIGH)
    unit = features / features.square().sum(1, keepdim=True).sqrt()
    semantic = upsampler.semantic(unit)
    keys = upsampler.gamma(semantic) * keys + upsampler.beta(semantic)
    weights = attention_weights(upsampler, queries, keys, None)
    due = torch.einsum("bpn,bcn->bcp", weights, features.flatten(2)).view(2, 5, *HIGH)
    torch.testing.assert_close(dense(upsampler, features, images), due)


def test_chunks_of_queries_change_neither_output_nor_gradients() -> None:
    torch.manual_seed(0)
    results = []
    q, k, v = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((50, 8), (12, 8), (12, 5)))
    for chunk in (1, 4 * 12 * 7, 10**6):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = chunked_attention(*leaves, heads=4, weights_at_once=chunk)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    due = mean_attention(*whole, heads=4)
    due.square().sum().backward()
    for result in results:
        torch.testing.assert_close(result, [due, *(x.grad for x in whole)])


def test_the_attention_matrix_never_exists_in_either_direction() -> None:
    leaves = [torch.randn(1, n, 8, requires_grad=True) for n in (400, 100, 100)]
    with Watch() as watch:
        chunked_attention(*leaves, heads=4, weights_at_once=4000).sum().backward()
    assert watch.numel <= 4000  # the matrix has 160 000


def test_anyup_attends_to_the_window_around_each_cell_cut_at_the_border() -> None:
    features, images = inputs()
    upsampler = build("anyup", radius=1)
    assert isinstance(upsampler, AnyUp)
    queries, keys = upsampler.guide(images, LOW, HIGH)
    joined = torch.cat([keys, upsampler.signature(features)], 1)
    keys = F.conv2d(F.pad(joined, (1, 1, 1, 1), mode="replicate"), upsampler.fuse.weight)
    rows, columns = (
        ((torch.arange(f * n) // f)[:, None] - torch.arange(n)).abs() <= 1
        for f, n in zip(FACTOR, LOW, strict=True)
    )
    seen = torch.einsum("yi,xj->yxij", rows.double(), columns.double()).bool()
    blocked = ~seen.reshape(HIGH[0] * HIGH[1], LOW[0] * LOW[1])
    weights = attention_weights(upsampler, queries, keys, blocked)
    due = torch.einsum("bpn,bcn->bcp", weights, features.flatten(2)).view(2, 5, *HIGH)
    torch.testing.assert_close(dense(upsampler, features, images), due)


def test_anyup_with_a_window_as_large_as_the_map_sees_all_of_it() -> None:
    features, images = inputs()
    wide, wider = build("anyup", radius=5), build("anyup", radius=40)
    torch.testing.assert_close(dense(wide, features, images), dense(wider, features, images))


def test_the_signature_is_the_mean_softmax_over_a_shared_bank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signature, (features, _) = ChannelSignature().double(), inputs()
    unit = features / features.square().sum(1, keepdim=True).sqrt()
    padded = F.pad(unit, (2, 2, 2, 2), mode="replicate")
    bank = signature.bank.weight.view(DIM, 1, 5, 5)
    due = sum(F.conv2d(padded[:, [c]], bank).softmax(1) for c in range(5)) / 5
    torch.testing.assert_close(signature(features), due)
    monkeypatch.setattr(anyup, "_RESPONSES_AT_ONCE", 2 * DIM * 24)  # chunks of 2, 2 and 1
    torch.testing.assert_close(signature(features), due)


def test_anyup_takes_any_number_of_channels_in_any_order() -> None:
    features, images = inputs(dim=8)
    upsampler = build("anyup")
    shuffled = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    high = dense(upsampler, features, images)
    torch.testing.assert_close(dense(upsampler, features[:, shuffled], images), high[:, shuffled])
    sizes = {
        dim: [tuple(p.shape) for p in AnyUp(replace(SPEC, spatial_dim=dim), FACTOR).parameters()]
        for dim in (5, 384)
    }
    assert sizes[5] == sizes[384]


def test_jafar_reads_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    features, images = inputs()
    upsampler = build("jafar")
    due = dense(upsampler, features, images)
    monkeypatch.setattr(jafar, "_WEIGHTS_AT_ONCE", 4 * 24 * 10)
    torch.testing.assert_close(dense(upsampler, features, images), due)
