"""Slices of flat tensors joined and cut anew, against a plain statement of both layouts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill.engine.resharding import (
    Resharding,
    cut_flat,
    cut_parameters,
    join,
    written_by_stage_3,
)

SIZES = (5, 8, 1, 3)
PARAMETERS = torch.arange(1.0, 1 + sum(SIZES)).split(SIZES)


def flat_slices(ranks: int) -> list[Tensor]:
    """ZeRO 1 and 2: one tensor, padded to a multiple of twice the ranks, in equal parts."""
    whole = torch.cat(list(PARAMETERS))
    width = -(-len(whole) // (2 * ranks)) * 2
    return list(torch.cat([whole, torch.zeros(width * ranks - len(whole))]).split(width))


def parameter_slices(ranks: int) -> list[Tensor]:
    """ZeRO 3: of each parameter a piece, padded to the same length on every rank."""
    pieces = []
    for values in PARAMETERS:
        width = -(-len(values) // ranks)
        pieces.append(torch.cat([values, torch.zeros(width * ranks - len(values))]).split(width))
    return [torch.cat([of_parameter[rank] for of_parameter in pieces]) for rank in range(ranks)]


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_the_slices_are_those_that_as_many_ranks_would_have_made(before: int, after: int) -> None:
    flat, by_parameter = flat_slices(after), parameter_slices(after)
    whole = join(flat_slices(before), SIZES, from_stage_3=False)
    for rank in range(after):
        width = len(flat[rank])
        assert torch.equal(cut_flat(whole, rank, width), flat[rank])
        assert torch.equal(cut_parameters(whole, SIZES, rank, after), by_parameter[rank])


def test_slices_without_their_padding_join_to_the_same() -> None:
    lean = [s[s > 0] for s in flat_slices(3)]
    whole = join(flat_slices(2), SIZES, from_stage_3=False)
    assert torch.equal(join(lean, SIZES, from_stage_3=False), whole)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slices_of_either_kind_join_to_the_parameters(ranks: int) -> None:
    whole = torch.cat(list(PARAMETERS))
    assert torch.equal(join(flat_slices(ranks), SIZES, from_stage_3=False), whole)
    assert torch.equal(join(parameter_slices(ranks), SIZES, from_stage_3=True), whole)


def library_engine(stage: int) -> SimpleNamespace:
    """The attributes of DeepSpeed's engine that cutting reads, in a single process."""
    whole = sum(SIZES)
    optimizer = {
        "bit16_groups": [PARAMETERS],
        "fp16_groups": [[SimpleNamespace(ds_numel=n) for n in SIZES]],
        "single_partition_of_fp32_groups": [torch.zeros(whole)],
    }
    return SimpleNamespace(
        optimizer=SimpleNamespace(**optimizer), zero_optimization_stage=lambda: stage
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_moments_are_cut_and_counts_are_kept(stage: int, tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    states = [
        {
            "scale": 2.0,
            "zero_stage": 2,
            "base_optimizer_state": {
                "state": {0: {"step": torch.tensor(7.0), "m": mine}},
                "param_groups": [1],
            },
            "single_partition_of_fp32_groups": [mine + 1],
        }
        for mine in flat_slices(2)
    ]
    own = {"scale": 1.0, "zero_stage": stage, "fp32_flat_groups": [], "optimizer_state_dict": {}}
    optimizer, weights = {
        2: ("base_optimizer_state", "single_partition_of_fp32_groups"),
        3: ("optimizer_state_dict", "fp32_flat_groups"),
    }[stage]
    resharding = Resharding(library_engine(stage), tmp_path, 2)
    assert resharding.needed
    merged = resharding.merge(states, own)
    moments, whole = merged[optimizer], torch.cat(list(PARAMETERS))
    assert (merged["scale"], merged["zero_stage"]) == (2.0, stage)
    assert moments["param_groups"] == [1]
    assert moments["state"][0]["step"] == 7
    assert torch.equal(moments["state"][0]["m"], whole)
    assert torch.equal(merged[weights][0], whole + 1)


def test_files_of_zero_3_are_recognized(tmp_path: Path) -> None:
    assert written_by_stage_3(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    assert not written_by_stage_3(tmp_path)
