"""The only module that imports DeepSpeed: how it is loaded, and what is changed in it."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.engine.engine_config import EngineConfig
from distill.runtime import timing
from distill.runtime.errors import RecipeError

_COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextmanager
def errors_kept(engine: Any) -> Iterator[Callable[[], None]]:
    """Keeps the errors of DeepSpeed's file writer, to be raised after its collectives.

    A rank that left `save_checkpoint` at a full disk would leave its peers in the barrier behind.
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


def time_collectives() -> None:
    """Counts DeepSpeed's collectives as communication, through its backend's methods.

    Those that it starts and waits for elsewhere (ZeRO 3's gathers of weights) show in what waits.
    """
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    for name in _COLLECTIVES:
        method = getattr(backend, name)
        if name not in vars(backend):  # of an engine before this one
            setattr(backend, name, _timed(method))


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        with timing.timed(timing.WAITING):
            return method(*arguments, **options)

    return timed


def require_precision(config: EngineConfig) -> None:
    """Refuses fp16 where the device has none.

    Raises:
        RecipeError: says what to take in its place.
    """
    from deepspeed.accelerator import get_accelerator

    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise RecipeError("engine.precision: this device has no fp16 arithmetic; use bf16, or fp32")


def import_deepspeed() -> Any:
    """Imports DeepSpeed, ready for a machine without a GPU and without a compiler.

    On the CPU DeepSpeed would compile a shared-memory collective for half a minute, which leaves
    69 MB a rank in /dev/shm for ever and serves inference only.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 announces to rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed import ops

    if not torch.cuda.is_available():
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, which `initialize` would, without torch's compiler behind it.

    Its kernels are decorated with `compile` at import, which loads the whole of inductor: 4 s and
    50 MB for an optimiser that is not offered here.
    """
    from deepspeed.runtime import compiler

    kept = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = kept


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's float32 weights on the CPU, by its own names; every rank must call this.

    Args:
        module: whose parameters ZeRO has split.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {name: b.detach().cpu().clone() for name, b in module.named_buffers()}
    persistent = set(module.state_dict().keys())
    weights = {name: b for name, b in weights.items() if name in persistent}
    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter
        weights[name] = full.detach().float().cpu().clone()
    return weights
