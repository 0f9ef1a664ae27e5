"""Facts about DeepSpeed 0.19.8 that the engine relies on.

A test that fails after an upgrade names what has to change here.
"""

from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_on_ranks

pytestmark = pytest.mark.process


def test_the_version_is_the_one_that_was_measured() -> None:
    assert metadata.version("deepspeed") == "0.19.8"
    assert metadata.version("webdataset") == "1.0.2"


def _engine(stage: int, **keys: Any) -> Any:
    import deepspeed

    torch.manual_seed(0)
    module = nn.Linear(4, 2, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **keys.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        **keys,
    }
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    return deepspeed.initialize(model=module, optimizer=sgd, config=config)[0]


def _two_backwards(managed: bool) -> float:
    engine = _engine(2, managed_gradient_accumulation=managed)
    for value in (1.0, 2.0):
        engine.backward(engine(torch.full((1, 4), value)).sum())
    engine.step()
    return float(engine.get_global_grad_norm())


def test_managed_accumulation_loses_the_first_of_two_backward_passes() -> None:
    """Why `managed_gradient_accumulation` is false: the gradient of 1 + 2 is 3 in every entry."""
    assert run_on_ranks(1, _two_backwards, True) != [3 * 8**0.5]
    (ours,) = run_on_ranks(1, _two_backwards, False)
    assert abs(ours - 3 * 8**0.5) < 1e-5


def _clip_default() -> float:
    import deepspeed

    module = nn.Linear(4, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    adamw = torch.optim.AdamW(module.parameters())
    return float(
        deepspeed.initialize(model=module, optimizer=adamw, config=config)[0].gradient_clipping()
    )


def test_clipping_defaults_to_one_when_the_key_is_absent() -> None:
    assert run_on_ranks(1, _clip_default) == [1.0]


def _patched_linear(ours: bool) -> bool:
    before = nn.functional.linear
    _engine(3, zero={"memory_efficient_linear": False} if ours else {})
    return nn.functional.linear is before


def test_zero_3_replaces_linear_for_everybody_unless_told_not_to() -> None:
    assert run_on_ranks(1, _patched_linear, False) == [False]
    assert run_on_ranks(1, _patched_linear, True) == [True]


def _partitions(stage: int) -> bool:
    optimizer = _engine(stage).optimizer
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return all(p.dtype == torch.float32 and p.ndim == 1 for p in getattr(optimizer, name))


def test_the_private_partitions_that_the_average_follows_have_their_names() -> None:
    for stage in (1, 2, 3):
        assert run_on_ranks(1, _partitions, stage) == [True]


def test_the_shared_memory_op_can_be_switched_off_before_it_compiles() -> None:
    from distill.engine.deepspeed_library import import_deepspeed

    deepspeed = import_deepspeed()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
