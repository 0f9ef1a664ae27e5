"""Attention within windows, for rectangular grids."""

import pytest
import torch
from torch import Tensor

from student.config import WindowConfig
from student.errors import StudentError
from student.windows import global_blocks, window_order
from tests.test_student_model import build, tensors

IMAGES = (2, 3, 16, 24)  # 4 x 6 patches


def test_the_order_is_window_after_window_each_row_by_row() -> None:
    assert window_order((4, 6), 2)[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    order = window_order((4, 6), 2)
    assert torch.equal(order[order.argsort()], torch.arange(24))
    patches = torch.randn(24, 5)
    assert torch.equal(patches[order][order.argsort()], patches)


@pytest.mark.parametrize(
    ("depth", "num_global", "expected"),
    [(12, 4, {2, 5, 8, 11}), (2, 1, {1}), (27, 4, {5, 11, 17, 23, 26}), (3, 9, {0, 1, 2})],
)
def test_global_blocks_end_each_stretch_and_the_last_is_one(
    depth: int, num_global: int, expected: set[int]
) -> None:
    assert global_blocks(depth, num_global) == expected


def reference(trunk: torch.nn.Module, images: Tensor, window: int, mode: str) -> Tensor:
    """Blocks 0 and 2 window by window, blocks 1 and 3 on all tokens, in row-major order."""
    x, skip = trunk.embedding(images), trunk.num_skip
    for number, block in enumerate(trunk.blocks):
        if number % 2:
            x = block(x)
            continue
        maps = x[:, skip:].unflatten(1, (4, 6)).clone()
        prefixes = []
        for top in range(0, 4, window):
            for left in range(0, 6, window):
                part = maps[:, top : top + window, left : left + window].flatten(1, 2)
                if mode == "copy":
                    seen = block(torch.cat([x[:, :skip], part], 1))
                    prefixes.append(seen[:, :skip])
                    part = seen[:, skip:]
                else:
                    part = block(part)
                size = (window, window)
                maps[:, top : top + window, left : left + window] = part.unflatten(1, size)
        prefix = torch.stack(prefixes).mean(0) if mode == "copy" else x[:, :skip]
        x = torch.cat([prefix, maps.flatten(1, 2)], 1)
    return trunk.norm(x)


@pytest.mark.parametrize("mode", ["copy", "drop"])
def test_tokens_are_those_of_windows_run_one_by_one(mode: str) -> None:
    student = build(depth=4, windows=WindowConfig(num_global=2, prefix=mode)).eval()
    images = torch.randn(IMAGES)
    expected = reference(student.trunk, images, 2, mode)
    torch.testing.assert_close(student.trunk(images, 2), expected, atol=1e-5, rtol=1e-5)
    assert (student.trunk(images) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["copy", "drop"])
def test_intermediates_of_windowed_blocks_are_in_row_major_order(mode: str) -> None:
    student = build(depth=4, windows=WindowConfig(num_global=1, prefix=mode)).eval()
    images = torch.randn(IMAGES)
    early, _, last = student.trunk.intermediates(images, [0, 1, 3], 2)
    assert torch.equal(last, student.trunk(images, 2))
    # Without attention a block is a function of each token: the order then shows itself.
    for block in student.trunk.blocks:
        block.attn.proj.weight.data.zero_()
    early, _, last = student.trunk.intermediates(images, [0, 1, 3], 2)
    plain_early, _, plain_last = student.trunk.intermediates(images, [0, 1, 3])
    skip = student.num_skip
    torch.testing.assert_close(early[:, skip:], plain_early[:, skip:])
    torch.testing.assert_close(last[:, skip:], plain_last[:, skip:])


def test_one_window_over_all_of_the_grid_is_global_attention() -> None:
    student = build(depth=4).eval()
    images = torch.rand(2, 3, 16, 16)
    for one, other in zip(tensors(student(images, 4)), tensors(student(images)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_through_windows() -> None:
    student = build(depth=4, activation_checkpointing=True)
    output = student(torch.rand(IMAGES), 2)
    sum(t.square().sum() for t in tensors(output)[2:]).backward()  # type: ignore[union-attr]
    assert [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_windows_that_do_not_tile_the_grid_are_refused() -> None:
    with pytest.raises(StudentError, match="windows of 4 x 4 patches do not tile a grid of 4 x 6"):
        build()(torch.rand(IMAGES), 4)


@pytest.mark.parametrize("window", [None, 2])
def test_no_token_reads_an_isolated_class_token(window: int | None) -> None:
    student = build(isolated=("sam",), depth=4).eval()
    images = torch.rand(IMAGES)
    before = student(images, window)
    student.trunk.embedding.class_tokens.data[1] += torch.randn(16)
    after = student(images, window)
    assert torch.equal(before.backbone.summary, after.backbone.summary)
    for name in ("clip", "siglip", "sam"):
        assert torch.equal(before.heads[name].spatial, after.heads[name].spatial)
    reading = build(depth=4).eval()
    before = reading(images, window)
    reading.trunk.embedding.class_tokens.data[1] += torch.randn(16)
    moved = before.heads["clip"].spatial - reading(images, window).heads["clip"].spatial
    assert moved.abs().max() > 1e-4


def test_an_isolated_class_token_reads_the_others() -> None:
    student = build(isolated=("siglip",)).eval()
    images = torch.rand(IMAGES)
    before = student(images).heads["siglip"].summary
    student.trunk.embedding.class_tokens.data[0] += torch.randn(16)
    assert (before - student(images).heads["siglip"].summary).abs().max() > 1e-4
