"""The only module that imports DeepSpeed: it loads the library and patches what we need changed."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.engine.engine_config import EngineConfig
from distill.runtime import distributed, timing
from distill.runtime.errors import RecipeError

_COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextmanager
def errors_kept(engine: Any) -> Iterator[Callable[[], None]]:
    """Collects the errors of DeepSpeed's file writer; the caller raises them after its barrier.

    A rank that raised at once, at a full disk, would leave the others waiting in that barrier.

    Args:
        engine: DeepSpeed's.

    Yields:
        A function that raises the first error, if there was one.
    """
    errors: list[Exception] = []
    writer = engine.checkpoint_engine
    save = writer.save

    def attempt(*arguments: Any, **options: Any) -> None:
        try:
            save(*arguments, **options)
        except Exception as error:
            errors.append(error)

    def raise_kept() -> None:
        if errors:
            raise errors[0]

    writer.save = attempt
    engine._copy_recovery_script = lambda folder: None  # DeepSpeed's own zero_to_fp32.py, unused
    try:
        yield raise_kept
    finally:
        del writer.save, engine._copy_recovery_script


@contextmanager
def groups_that_wait() -> Iterator[None]:
    """Gives process groups that are made during the block the time limit of the run's own.

    DeepSpeed makes one of all ranks, without a limit: torch's default with NCCL, ten minutes, would
    end a run in which a rank compiles for longer.
    """
    new_group = torch.distributed.new_group

    @functools.wraps(new_group)
    def with_limit(*arguments: Any, **options: Any) -> Any:
        if len(arguments) < 2 and options.get("timeout") is None:
            options["timeout"] = distributed.time_limit()
        return new_group(*arguments, **options)

    torch.distributed.new_group = with_limit
    try:
        yield
    finally:
        torch.distributed.new_group = new_group


def time_collectives() -> None:
    """Times DeepSpeed's collectives as communication, by wrapping the methods of its backend.

    Asynchronous ones (ZeRO 3 gathers weights so) count where their result is waited for.
    """
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    for name in _COLLECTIVES:
        method = getattr(backend, name)
        if name not in vars(backend):  # else an earlier engine has wrapped it
            setattr(backend, name, _timed(method))


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        with timing.timed(timing.WAITING):
            return method(*arguments, **options)

    return timed


def require_precision(config: EngineConfig) -> None:
    """Checks that the device can compute in the precision of a recipe.

    Raises:
        RecipeError: the device has no fp16.
    """
    from deepspeed.accelerator import get_accelerator

    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise RecipeError("engine.precision: this device has no fp16 arithmetic; use bf16, or fp32")


def import_deepspeed() -> Any:
    """Imports DeepSpeed so that it works on a machine without a GPU and without a compiler.

    On a CPU DeepSpeed would spend half a minute compiling a collective in shared memory, which is
    used for inference only and never frees its 69 MB a rank in /dev/shm.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed import ops

    if not torch.cuda.is_available():
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, as `initialize` would, but without torch's compiler.

    Its functions are compiled at import, which loads all of inductor: 4 s and 50 MB for an
    optimizer that no recipe can choose.
    """
    from deepspeed.runtime import compiler

    kept = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = kept


def float32_slices(engine: Any) -> list[Tensor]:
    """This rank's slice of the float32 weights, one flat tensor for each parameter group.

    They are private attributes of DeepSpeed's engine; a test in `tests/canary` checks their names.
    """
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def gathered_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights in float32 and persistent buffers of a module that ZeRO has split, on the CPU.

    They have the module's own names. Every rank must call this.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    persistent = set(module.state_dict().keys())
    buffers = {n: b.detach() for n, b in module.named_buffers() if n in persistent}
    weights = {
        n: (b.float() if b.is_floating_point() else b).cpu().clone() for n, b in buffers.items()
    }
    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter
        weights[name] = full.detach().float().cpu().clone()
    return weights
