"""Counts the FLOPs and the memory of code that runs on tensors without memory.

Torch's fake tensors are meta tensors that act as if they were on a device. Here that is the CPU, as
the meta device has neither autocast nor fused attention, and both change how much memory a step
takes. Thousands of operations run in a second, whatever their sizes.
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


_aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, *inputs: Any, **_: Any) -> int:
    """Without the product that the kernel recomputes; torch's formula for GPUs includes it."""
    return 2 * _attention(*inputs)


def _convolution_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, *arguments: Any, out_val: Any, **__: Any
) -> int:
    """Each gradient costs what the forward pass does; torch's formula ignores groups here."""
    transposed, groups, wanted = arguments[4], arguments[6], arguments[7]
    if transposed or groups == 1:
        shapes = grad, inputs, weight, *arguments
        return int(flop_registry[_aten.convolution_backward](*shapes, out_val=out_val))
    return 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])


# Torch's formulas, and those of attention on the CPU, which torch lacks. Torch's `FlopCounterMode`
# does not fit: its hooks keep alive what activation checkpointing has recomputed.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass
class Usage:
    """The FLOPs and bytes of one component of a step.

    Attributes:
        flops: by precision, of matrix products, convolutions and attention; a multiply-add counts
            as two.
        held: bytes allocated within it that are still held at its end.
        peak: the most bytes held within it, beyond those at its start.
    """

    flops: Counter[torch.dtype] = field(default_factory=Counter)
    held: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Trace:
    """One micro-batch, forward and backward.

    Attributes:
        images: in the micro-batch.
        components: name to usage.
        peak: the most bytes held beyond the weights, without gradients of parameters.
        peak_with_gradients: the same with them, if they stay until the end.
    """

    images: int
    components: dict[str, Usage]
    peak: int
    peak_with_gradients: int

    def flops(self, *names: str) -> Counter[torch.dtype]:
        """FLOPs of an image by precision, of the named components or else of all."""
        total: Counter[torch.dtype] = Counter()
        for name in names or self.components:
            total.update(self.components[name].flops)
        return Counter({dtype: flops // self.images for dtype, flops in total.items()})


class FakeWeights:
    """Gives modules weights without memory, so that their own code runs on fake tensors."""

    def __init__(self) -> None:
        # Small tensors that code makes on its way are real, so that it can read their values.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fill(self, module: M) -> M:
        """Replaces a module's weights in place; they may be on the meta device."""
        with self._mode:
            return module.to_empty(device="cpu")

    def tensor(self, *shape: int) -> Tensor:
        """A float32 tensor without memory."""
        with self._mode:
            return torch.empty(*shape)


class Meter(TorchDispatchMode):
    """Counts the operations inside its `with` block.

    Tensors that exist before it do not count. Gradients of parameters count separately, because it
    depends on the engine how long they stay.

    Args:
        modules: all that run; their weights do not count.

    Attributes:
        components: name to usage; FLOPs count for the innermost component only, bytes also for
            those around it.
        live: bytes held now, without gradients of parameters.
        gradients: bytes of the gradients of parameters.
        peak: the largest `live` so far.
        peak_with_gradients: the largest sum of both so far.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.components: dict[str, Usage] = {}
        self.live = self.gradients = self.peak = self.peak_with_gradients = 0
        self._modules = modules
        self._sizes: dict[int, int] = {}  # of the live storages, by identity
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
            self.components.setdefault(self._name, Usage()).flops[dtype] += flops
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def trace(self, images: int) -> Trace:
        """The counts so far, as those of a micro-batch of `images`."""
        named = {name: usage for name, usage in self.components.items() if name}
        return Trace(images, named, self.peak, self.peak_with_gradients)

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Counts the block for a component."""
        outer = self._begin(name)
        yield
        self._end(outer)

    def switch_to(self, name: str) -> None:
        """Counts the FLOPs that follow for another component."""
        self._name = name
        self.components.setdefault(name, Usage())

    def watch(self, module: nn.Module, name: str) -> None:
        """Counts every pass of a module for a component, until the `with` block ends.

        Its backward pass counts too: all that follows the gradient of a tensor that it returns, or
        of one in a tuple.
        """
        outer: list[str] = []

        def before(*_: Any) -> None:
            outer.append(self._begin(name))

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self._end(outer.pop())
            for each in output if isinstance(output, tuple) else (output,):
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(lambda _: self.switch_to(name))

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _begin(self, name: str) -> str:
        """Opens a component; returns the one that was current."""
        outer = self._name
        self._open.append((name, self.live, self.peak))
        self.peak = self.live
        self.switch_to(name)
        return outer

    def _end(self, outer: str) -> None:
        """Closes the component that was opened last, and goes on with `outer`."""
        name, start, peak = self._open.pop()
        usage = self.components[name]
        usage.peak = max(usage.peak, self.peak - start)
        usage.held += self.live - start
        self.peak = max(self.peak, peak)
        self.switch_to(outer)

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
