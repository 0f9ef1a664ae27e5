"""Shares of flat tensors cut anew, against a plain statement of both layouts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.engine.resharding import (
    cut_flat,
    cut_parameters,
    join,
    reshard_state,
    written_by_parameter,
)

SIZES = (5, 8, 1, 3)
PARAMETERS = torch.arange(1.0, 1 + sum(SIZES)).split(SIZES)


def flat_shares(ranks: int) -> list[Tensor]:
    """ZeRO 1 and 2: one tensor, padded to a multiple of twice the ranks, in equal parts."""
    whole = torch.cat(list(PARAMETERS))
    width = -(-len(whole) // (2 * ranks)) * 2
    return list(torch.cat([whole, torch.zeros(width * ranks - len(whole))]).split(width))


def parameter_shares(ranks: int) -> list[Tensor]:
    """ZeRO 3: of each parameter a piece, padded to the same length on every rank."""
    pieces = []
    for values in PARAMETERS:
        width = -(-len(values) // ranks)
        pieces.append(torch.cat([values, torch.zeros(width * ranks - len(values))]).split(width))
    return [torch.cat([of_parameter[rank] for of_parameter in pieces]) for rank in range(ranks)]


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_the_shares_are_those_that_as_many_ranks_would_have_made(before: int, after: int) -> None:
    flat, by_parameter = flat_shares(after), parameter_shares(after)
    for rank in range(after):
        width = len(flat[rank])
        assert torch.equal(cut_flat(flat_shares(before), SIZES, rank, width), flat[rank])
        mine = cut_parameters(parameter_shares(before), SIZES, rank, after)
        assert torch.equal(mine, by_parameter[rank])


def test_shares_whose_padding_was_taken_off_give_the_same() -> None:
    lean = [share[share > 0] for share in flat_shares(3)]
    due = flat_shares(2)
    for rank in range(2):
        assert torch.equal(cut_flat(lean, SIZES, rank, len(due[rank])), due[rank])


def test_vectors_are_cut_and_counts_are_kept() -> None:
    states = [
        {
            "scale": 2.0,
            "zero_stage": 2,
            "base_optimizer_state": {
                "state": {0: {"step": torch.tensor(7.0), "m": share}},
                "param_groups": [1],
            },
            "single_partition_of_fp32_groups": [share + 1],
        }
        for share in flat_shares(2)
    ]

    def whole(shares: list[Tensor], group: int) -> Tensor:
        assert group == 0
        return torch.cat(shares)

    own = {"scale": 1.0, "zero_stage": 3, "fp32_flat_groups": [], "optimizer_state_dict": {}}
    keys = {False: ("base_optimizer_state", "single_partition_of_fp32_groups")}
    keys[True] = ("optimizer_state_dict", "fp32_flat_groups")
    everything = torch.cat(flat_shares(2))
    for to_stage_3, (optimizer, weights) in keys.items():
        came = reshard_state(states, whole, own, from_stage_3=False, to_stage_3=to_stage_3)
        moments = came[optimizer]
        assert came["scale"] == 2.0
        assert came["zero_stage"] == 3
        assert moments["param_groups"] == [1]
        assert moments["state"][0]["step"] == 7
        assert torch.equal(moments["state"][0]["m"], everything)
        assert torch.equal(came[weights][0], everything + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_of_either_kind_join_to_the_same_parameters(ranks: int) -> None:
    flat = join(flat_shares(ranks), SIZES, by_parameter=False)
    assert torch.equal(join(parameter_shares(ranks), SIZES, by_parameter=True), flat)
    assert len(flat) == sum(SIZES)


def test_zero_3_is_told_by_its_files(tmp_path: Path) -> None:
    assert written_by_parameter(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    assert not written_by_parameter(tmp_path)
