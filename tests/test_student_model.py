"""The student: shapes, who reads what, gradients, determinism, refusals."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from student.config import HeadConfig, StudentConfig
from student.errors import StudentError
from student.heads import MLP2, Head
from student.model import Student, StudentOutput
from teachers.features import FeatureSpec
from teachers.normalization import OPENAI_MEAN, OPENAI_STD
from teachers.upsamplers.views import warp

SPECS = {"patch_size": 14, "resolution": (28, 28)}
TARGETS = {
    "clip": FeatureSpec(summary_dim=5, spatial_dim=6, **SPECS),
    "sam": FeatureSpec(summary_dim=None, spatial_dim=7, **SPECS),
    "siglip": FeatureSpec(summary_dim=8, spatial_dim=9, **SPECS),
}
SMALL = {
    "width": 16,
    "heads": 2,
    "depth": 2,
    "patch_size": 4,
    "max_resolution": 24,
    "num_registers": 3,
    "head": HeadConfig(hidden_dim=12, num_layers=1),
}


def build(targets: Mapping[str, FeatureSpec] = TARGETS, **changes: object) -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(**(SMALL | changes)), targets)


def tensors(output: StudentOutput) -> list[Tensor]:
    pairs = [output.backbone, *output.heads.values()]
    return [t for pair in pairs for t in pair if t is not None]


@pytest.mark.parametrize("size", [(8, 20), (20, 8), (24, 24), (32, 4)])
def test_outputs_are_maps_on_the_students_own_grid(size: tuple[int, int]) -> None:
    student = build()
    grid = (size[0] // 4, size[1] // 4)
    output = student(torch.rand(2, 3, *size))
    assert output.backbone.summary.shape == (2, 2 * 16)
    assert output.backbone.spatial.shape == (2, 16, *grid)
    assert list(output.heads) == list(TARGETS)
    for name, spec in TARGETS.items():
        summary, spatial = output.heads[name]
        assert spatial.shape == (2, spec.spatial_dim, *grid)
        assert (summary is None) == (spec.summary_dim is None)
        assert summary is None or summary.shape == (2, spec.summary_dim)
    assert {t.dtype for t in tensors(output)} == {torch.float32}


def test_tokens_are_class_tokens_registers_and_patches() -> None:
    student = build()
    assert student.num_skip == 3 + 3
    assert student.trunk(torch.rand(2, 3, 8, 20)).shape == (2, 3 + 3 + 2 * 5, 16)
    assert student.spec.summary_dim == 2 * 16


def test_maps_hold_the_tokens_after_the_prefix_in_row_major_order() -> None:
    student, images = build().eval(), torch.rand(2, 3, 8, 20)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (OPENAI_MEAN, OPENAI_STD))
    tokens = student.trunk((images - mean) / std)
    output = student(images)
    for row, column in ((0, 3), (1, 2)):
        cell = output.backbone.spatial[:, :, row, column]
        torch.testing.assert_close(cell, tokens[:, 6 + row * 5 + column])
    torch.testing.assert_close(output.backbone.summary, tokens[:, [0, 2]].flatten(1))


def test_intermediates_are_the_maps_of_a_student_that_ends_there() -> None:
    student, images = build().eval(), torch.rand(2, 3, 8, 20)
    first, last = student.forward_intermediates(images, [0, 1])
    assert torch.equal(last, student(images).backbone.spatial)
    student.trunk.blocks = student.trunk.blocks[:1]
    assert torch.equal(first, student(images).backbone.spatial)
    assert not torch.equal(first, last)


def test_a_summary_head_reads_only_its_own_slot() -> None:
    student = build()
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    student.trunk.norm.register_forward_hook(keep)
    student(torch.rand(2, 3, 8, 20)).heads["siglip"].summary.square().sum().backward()
    (tokens,) = kept
    assert tokens.grad is not None
    used = tokens.grad.abs().amax(dim=(0, 2)) > 0
    assert used.tolist() == [slot == 2 for slot in range(tokens.shape[1])]


def test_the_backbone_has_no_summary_where_no_teacher_has() -> None:
    student = build({"sam": TARGETS["sam"]})
    assert student(torch.rand(1, 3, 8, 20)).backbone.summary is None
    assert student.spec.summary_dim is None


def test_every_parameter_gets_a_gradient_from_the_heads() -> None:
    student = build(layer_scale=1e-5)
    output = student(torch.rand(2, 3, 8, 20))
    sum((t**2).sum() for t in tensors(output)[2:]).backward()
    without = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_eval_is_deterministic_and_training_is_not() -> None:
    student, images = build(), torch.rand(2, 3, 8, 20)
    first, second = student.train()(images), student(images)
    assert not torch.equal(first.backbone.spatial, second.backbone.spatial)
    for one, two in zip(tensors(student.eval()(images)), tensors(student(images)), strict=True):
        assert torch.equal(one, two)


def test_an_images_output_does_not_depend_on_the_rest_of_its_batch() -> None:
    student, images = build().eval(), torch.rand(3, 3, 8, 20)
    alone = student(images[1:2])
    for one, many in zip(tensors(alone), tensors(student(images)), strict=True):
        torch.testing.assert_close(one, many[1:2])


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_activation_checkpointing_changes_neither_outputs_nor_gradients(
    layer_scale: float | None,
) -> None:
    images = torch.rand(2, 3, 8, 20)
    results = []
    for on in (False, True):
        student = build(activation_checkpointing=on, layer_scale=layer_scale)
        calls = []
        student.trunk.blocks[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)  # the second pass ends before the last hook
        )
        torch.manual_seed(1)
        output = tensors(student(images))
        sum((t**2).sum() for t in output).backward()
        assert len(calls) == (2 if on else 1)
        results.append(output + [p.grad for p in student.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_bfloat16_student_returns_float32_close_to_its_own() -> None:
    student, images = build().eval(), torch.rand(2, 3, 8, 20)
    exact = tensors(student(images))
    rounded = tensors(student.bfloat16()(images))
    assert {t.dtype for t in rounded} == {torch.float32}
    for one, two in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one, two, atol=0.06, rtol=0.06)


def test_a_cast_of_the_module_leaves_the_pixel_normalisation_exact() -> None:
    seen: list[Tensor] = []
    student = build().bfloat16()
    student.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student(torch.zeros(1, 3, 4, 4))
    expected = -torch.tensor(OPENAI_MEAN) / torch.tensor(OPENAI_STD)
    assert torch.equal(seen[0][0, :, 0, 0], expected)


def test_weight_decay_leaves_positions_and_tokens_alone() -> None:
    names = {f"trunk.embedding.{n}" for n in ("positions", "class_tokens", "registers")}
    assert build().no_weight_decay() == names
    assert build(num_registers=0).no_weight_decay() == names - {"trunk.embedding.registers"}


def test_tokens_and_positions_start_with_the_variance_of_one_over_the_width() -> None:
    torch.manual_seed(0)
    student = Student(StudentConfig(size="tiny", depth=1, max_resolution=256), TARGETS)
    for name in student.no_weight_decay():
        assert student.get_parameter(name).std().item() == pytest.approx(192**-0.5, rel=0.1)
    assert student.trunk.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not student.trunk.blocks[0].attn.qkv.bias.any()


def test_the_mlp_is_residual_with_norm_and_gelu_before_each_inner_layer() -> None:
    torch.manual_seed(0)
    mlp = MLP2(4, 3, hidden_dim=6, num_layers=2).double()
    assert not mlp.final[2].bias.any()
    x = torch.randn(5, 4, dtype=torch.double)

    def act(v: Tensor) -> Tensor:  # LN with fresh affine terms, then exact GELU
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5) ** 0.5
        return v * 0.5 * (1 + torch.erf(v / 2**0.5))

    y = x @ mlp.fc1.weight.T + mlp.fc1.bias
    for block in mlp.blocks:
        y = y + act(y) @ block[2].weight.T + block[2].bias
    y = act(y) @ mlp.final[2].weight.T
    torch.testing.assert_close(mlp(x), y.float())


def test_an_upsampling_head_writes_each_cell_by_row_then_column_then_channel() -> None:
    head = Head(4, TARGETS["clip"], HeadConfig(hidden_dim=6, num_layers=0), upsample=2)
    nn.init.zeros_(head.spatial.final[2].weight)
    head.spatial.final[2].bias.data = torch.arange(24.0)  # (row, column, channel) in a cell
    spatial = head(torch.zeros(1, 4), torch.randn(1, 6, 4), (2, 3)).spatial
    assert spatial.shape == (1, 6, 4, 6)
    for row in range(4):
        for column in range(6):
            first = (row % 2 * 2 + column % 2) * 6
            assert spatial[0, :, row, column].tolist() == list(range(first, first + 6))


def test_only_the_named_teachers_map_is_upsampled() -> None:
    head = HeadConfig(hidden_dim=12, num_layers=0, upsample={"sam": 2})
    output = build(head=head)(torch.rand(1, 3, 8, 20))
    assert output.heads["sam"].spatial.shape == (1, 7, 4, 10)
    assert output.heads["clip"].spatial.shape == (1, 6, 2, 5)


def test_a_head_without_upsampling_keeps_the_patches_order() -> None:
    head = Head(4, TARGETS["clip"], HeadConfig(hidden_dim=6, num_layers=0), upsample=1)
    patches = torch.randn(2, 6, 4)
    spatial = head(torch.zeros(2, 4), patches, (2, 3)).spatial
    torch.testing.assert_close(spatial[1, :, 1, 0], head.spatial(patches[1, 3]))


ATTENTIVE = HeadConfig(hidden_dim=12, num_layers=1, attention_blocks=2, attention_heads=4)


def test_an_attention_head_is_blocks_over_the_patches_then_an_mlp_without_inner_blocks() -> None:
    """As in C-RADIOv4: LayerScale 1e-5, no class tokens; the summary keeps its inner blocks."""
    head = build(head=ATTENTIVE).heads["clip"]
    assert [float(block.ls1.gamma.detach().unique()) for block in head.attention] == (
        pytest.approx([1e-5, 1e-5])
    )
    assert (len(head.spatial.blocks), len(head.summary.blocks)) == (0, 1)
    for block in head.attention:
        block.ls1.gamma.data.fill_(1.0)
    token, patches = torch.randn(2, 16), torch.randn(2, 6, 16)
    seen = patches
    for block in head.attention:
        assert block.attn.num_heads == 4
        seen = block(seen)
    spatial = head(token, patches, (2, 3)).spatial
    torch.testing.assert_close(spatial[1, :, 1, 2], head.spatial(seen[1, 5]))
    other = head(torch.randn(2, 16), patches, (2, 3)).spatial
    assert torch.equal(spatial, other)
    assert (spatial - head.spatial(patches).movedim(2, 1).unflatten(2, (2, 3))).abs().max() > 1e-3


def test_attention_heads_upsample_and_look_at_no_other_image() -> None:
    head = ATTENTIVE.model_copy(update={"upsample": {"sam": 2}})
    student, images = build(head=head).eval(), torch.rand(3, 3, 8, 20)
    output = student(images)
    assert output.heads["sam"].spatial.shape == (3, 7, 4, 10)
    for one, many in zip(tensors(student(images[1:2])), tensors(output), strict=True):
        torch.testing.assert_close(one, many[1:2])


def test_projecting_before_warping_is_not_warping_before_projecting() -> None:
    """Why the heads run on the student's own grid, and maps are aligned after them."""
    head = build(head=ATTENTIVE).heads["clip"]
    for block in head.attention:
        block.ls1.gamma.data.fill_(1.0)
    patches = torch.randn(1, 24, 16)
    views = torch.eye(3)[None] + torch.tensor([[[0.1, 0.05, 0.2], [-0.05, 0.1, 0.1], [0, 0, 0]]])

    def warped(maps: Tensor) -> Tensor:
        return warp(maps, views, (4, 6))

    first = warped(head(torch.zeros(1, 16), patches, (4, 6)).spatial)
    tokens = warped(patches.movedim(2, 1).unflatten(2, (4, 6))).flatten(2).movedim(1, 2)
    then = head(torch.zeros(1, 16), tokens, (4, 6)).spatial
    assert (first - then).abs().max() > 0.05


def test_attention_heads_stay_in_float32_under_autocast() -> None:
    student, images = build(head=ATTENTIVE), torch.rand(1, 3, 8, 20)
    seen: list[Tensor] = []
    student.heads["clip"].attention[1].mlp.fc1.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.autocast("cpu", torch.bfloat16):
        student(images)
    assert [x.dtype for x in seen] == [torch.float32]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 10, 20), "10 x 20 px.*multiples of 4 px.*nearest size is 8 x 20 px"),
        ((1, 3, 8, 2), "nearest size is 8 x 4 px"),
        ((1, 1, 8, 20), r"shape \(1, 1, 8, 20\).*expected \(B, 3, H, W\)"),
        ((3, 8, 20), r"shape \(3, 8, 20\)"),
    ],
)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(StudentError, match=message):
        build()(torch.rand(shape))


@pytest.mark.parametrize(
    ("names", "upsample", "message"),
    [
        ([], {}, "needs at least one teacher"),
        (["a.b"], {}, "'a.b'.*contain a dot"),
        (["items"], {}, "'items'.*attribute"),
        (["clip"], {"clop": 2}, r"no teacher 'clop' \(did you mean 'clip'\?\).*\['clip'\]"),
    ],
)
def test_targets_that_cannot_work_are_refused(
    names: list[str], upsample: dict[str, int], message: str
) -> None:
    head = HeadConfig(upsample=upsample)
    with pytest.raises(StudentError, match=message):
        build(dict.fromkeys(names, TARGETS["clip"]), head=head)


def test_an_isolated_teacher_that_is_not_there_is_refused() -> None:
    with pytest.raises(StudentError, match=r"student.isolated: no teacher 'clop'.*'clip'"):
        build(isolated=("clop",))
