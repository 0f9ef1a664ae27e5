"""Counts what code would compute and hold, on tensors that have no memory.

Fake tensors are torch's meta tensors that answer as if they lay on a device. Here that is the CPU,
because the meta device itself knows neither autocast nor fused attention, and both decide what a
step holds. Thousands of operations take a second, whatever their sizes are.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

M = TypeVar("M", bound=nn.Module)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, *inputs: Any, **_: Any) -> int:
    """Without what its kernel computes again, which torch counts for those of GPUs."""
    return 2 * _attention(*inputs)


# torch's own formulas, but it knows the attention kernels of GPUs only. Not its `FlopCounterMode`,
# whose hooks keep alive what activation checkpointing has computed again.
_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass
class Part:
    """What a part of a step takes.

    Attributes:
        flops: by precision, of products of matrices, convolutions and attention; a multiply-add
            counts as two.
        held: bytes that are still there at its end.
        peak: bytes beyond those at its start, at most.
    """

    flops: Counter[torch.dtype] = field(default_factory=Counter)
    held: int = 0
    peak: int = 0


class Imitation:
    """Gives modules weights without memory, so that real code can run on them."""

    def __init__(self) -> None:
        # Small tensors that code makes on its way are real, so that it may look at their values.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, module: M) -> M:
        """Replaces a module's weights in place; they may be on the meta device."""
        with self._fake:
            return module.to_empty(device="cpu")

    def tensor(self, *shape: int) -> Tensor:
        """A float32 tensor."""
        with self._fake:
            return torch.empty(*shape)


class Meter(TorchDispatchMode):
    """Watches the operations inside its `with`.

    What was there before is not counted. The gradients of parameters are counted apart: how long
    they stay is the engine's business.

    Args:
        modules: whose weights were there before.

    Attributes:
        parts: by name; nested parts count for themselves and, in bytes only, for the outer one.
        live: bytes held now, without gradients.
        gradients: bytes of the parameters' gradients.
        peak: the most that `live` has been.
        peak_with_gradients: the most that both have been together.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts: dict[str, Part] = {}
        self.live = self.gradients = self.peak = self.peak_with_gradients = 0
        self._modules = modules
        self._sizes: dict[int, int] = {}  # of the storages that are there, by identity
        self._gradients: set[int] = set()
        self._open: list[tuple[str, int, int]] = []  # name, bytes at the start, the outer peak
        self._name = ""
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self._modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._sizes[id(tensor.untyped_storage())] = 0
                if tensor.requires_grad:
                    hook = tensor.register_post_accumulate_grad_hook(self._is_gradient)
                    self._handles.append(hook)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in _FORMULAS:
            flops = _FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
            dtype = next(each.dtype for each in args if isinstance(each, Tensor))
            self.parts.setdefault(self._name, Part()).flops[dtype] += flops
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to a part."""
        outer = self.begin(name)
        yield
        self.end(outer)

    def begin(self, name: str) -> str:
        """Opens a part; returns the one that was open."""
        outer = self._name
        self._open.append((name, self.live, self.peak))
        self.peak = self.live
        self.name(name)
        return outer

    def end(self, outer: str) -> None:
        """Closes the part that was opened last; what follows belongs to `outer`."""
        name, start, peak = self._open.pop()
        part = self.parts[name]
        part.peak = max(part.peak, self.peak - start)
        part.held += self.live - start
        self.peak = max(self.peak, peak)
        self.name(outer)

    def name(self, name: str) -> None:
        """From here on FLOPs count for another part."""
        self._name = name
        self.parts.setdefault(name, Part())

    def inside(self, module: nn.Module, name: str) -> None:
        """Every pass of a module belongs to a part, for the time of the `with`.

        Its backward pass does where it returns one tensor: from the gradient of that on.
        """
        outer: list[str] = []

        def before(*_: Any) -> None:
            outer.append(self.begin(name))

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self.end(outer.pop())
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda _: self.name(name))

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._remove, key).atexit = False
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)

    def _remove(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._gradients:
            self._gradients.remove(key)
            self.gradients -= size
        else:
            self.live -= size

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._add(parameter.grad)
        key = id(parameter.grad.untyped_storage())
        if key not in self._gradients:
            self._gradients.add(key)
            self.live -= self._sizes[key]
            self.gradients += self._sizes[key]
