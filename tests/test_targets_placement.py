"""Teachers whose weights wait elsewhere: the same bits, one block at a time, ranks in step."""

import pytest
import torch
from torch import Tensor, nn

from distill.runtime import distributed
from distill.targets.ensemble import Ensemble
from distill.targets.placement import Placement, blocks_of, place_teacher
from distill.tasks.build import build_teachers
from teachers.build import build_teacher, parse_teacher
from teachers.teacher import Teacher
from tests.doubles import Curved
from tests.ranks import run_on_ranks
from tests.test_training_arms import recipe

VIT = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 32]}


def vit(dtype: torch.dtype | None = None) -> Teacher:
    torch.manual_seed(0)
    return build_teacher(parse_teacher(VIT), device="cpu", dtype=dtype)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def waiting(teacher: nn.Module) -> list[str]:
    return [name for name, p in teacher.named_parameters() if not p.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["offloaded", "sharded"])
def test_features_are_the_same_bits_in_every_precision(
    placement: Placement, dtype: torch.dtype
) -> None:
    whole, placed = vit(dtype), vit(dtype)
    place_teacher(placed, placement, distributed.Peers())
    assert all("blocks" in name for name in waiting(placed))
    for count in (3, 1):
        for one, other in zip(whole(images(count)), placed(images(count)), strict=True):
            assert torch.equal(one, other)


def test_only_the_block_that_runs_has_its_weights() -> None:
    teacher = vit()
    blocks = blocks_of(teacher)
    place_teacher(teacher, "offloaded", distributed.Peers())
    everything = set(waiting(teacher))
    seen: list[set[str]] = []
    for block in blocks:
        block.register_forward_hook(
            lambda *_: seen.append(everything - set(waiting(teacher))), prepend=True
        )
    teacher(images())
    assert len(seen) == len(blocks) > 1
    assert [len(names) for names in seen] == [len(list(b.parameters())) for b in blocks]
    assert set(waiting(teacher)) == everything != set()


def test_a_block_that_fails_lets_go_of_its_weights() -> None:
    teacher = vit()
    block = blocks_of(teacher)[0]
    place_teacher(teacher, "offloaded", distributed.Peers())
    before = waiting(teacher)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        block(torch.zeros(1, 2, 7))
    assert waiting(teacher) == before


def test_an_encoder_whose_lists_hold_little_comes_and_goes_as_a_whole() -> None:
    whole, placed = Curved(), Curved()
    assert blocks_of(placed) == [placed]
    place_teacher(placed, "offloaded", distributed.Peers())
    assert waiting(placed) == ["net.weight", "net.bias"]
    shown = torch.rand(2, 3, 12, 20)
    assert torch.equal(whole(shown).spatial, placed(shown).spatial)


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    first, second = (nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2))
    stage = nn.ModuleList([first, second, first])  # a shared block is one
    encoder = nn.ModuleDict({"stem": nn.Linear(2, 2), "stages": nn.ModuleList([stage])})
    assert blocks_of(encoder) == [first, second]


def sharded_on_a_rank(parts: list[range]) -> tuple[int, list[Tensor]]:
    teacher = vit()
    peers = distributed.peers_among(parts)
    ensemble = Ensemble({"expert": teacher}, 16)
    whole = ensemble.fingerprints()
    ensemble.place({"expert": "sharded"}, peers)
    assert ensemble.fingerprints() == whole
    # Other parts call it as often as they like.
    calls = 1 if 0 in parts[0] and distributed.rank() in parts[0] else 2
    found = [ensemble(images(2))["expert"].spatial for _ in range(calls)]
    return peers.size, found


@pytest.mark.process
@pytest.mark.parametrize("parts", [[range(0, 3)], [range(0, 1), range(1, 3)]])
def test_the_ranks_of_a_part_gather_the_same_bits_together(parts: list[range]) -> None:
    due = Ensemble({"expert": vit()}, 16)(images(2))["expert"].spatial
    for rank, (size, found) in enumerate(run_on_ranks(3, sharded_on_a_rank, parts)):
        assert size == next(len(part) for part in parts if rank in part)
        assert all(torch.equal(maps, due) for maps in found)


def test_placed_teachers_are_built_in_host_memory_and_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Teacher] = []
    monkeypatch.setattr("distill.tasks.build.compile_teacher", compiled.append)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    made = recipe(resolution=32, batch_size=4)
    made = made.model_copy(update={"targets": made.targets.model_copy(update={"compile": True})})
    teachers = build_teachers(made, in_host=["clip"])
    assert not teachers["clip"].mean.is_meta
    assert teachers["siglip"].mean.is_meta
    assert compiled == [teachers["siglip"]]
