"""Keeps a teacher's weights off the device: its blocks wait in host memory, or split over ranks.

A block is a member of an encoder's outermost lists (timm's `blocks`, open_clip's `resblocks`, the
hub's `layer`). Its weights are copied to the device as one run of bytes when the block is called,
and freed when it returns, so that the device holds one block at a time. Modules outside of lists
stay on the device. The bytes do not change, so neither do the features. The cost of each call: the
weights of an offloaded teacher cross the bus once; those of a sharded teacher are gathered from
the other ranks, as in FSDP. Neither overlaps with computation.
"""

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.runtime import distributed
from distill.targets.routes import bare_encoder
from teachers.teacher import Teacher

Placement = Literal["offloaded", "sharded"]
_ALIGNMENT = 256  # bytes, as torch aligns what it allocates on a GPU


def place_teacher(teacher: Teacher, placement: Placement, peers: distributed.Peers) -> None:
    """Moves a teacher to this process's device, but its blocks' weights to where they wait.

    Args:
        teacher: in host memory, with its weights; changed in place.
        placement: where the blocks' weights wait.
        peers: the ranks that run the teacher in step with this one: equally often, on equally many
            images.
    """
    keep = _in_host_memory if placement == "offloaded" else _split_over(peers)
    for block in blocks_of(bare_encoder(teacher)):
        _Block(block, keep)
    teacher.to(distributed.device())


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The modules that move one at a time; the encoder if its lists hold under half its weights."""
    blocks = [block for block in _members(encoder) if _size(block)]
    enough = sum(map(_size, blocks)) > _size(encoder) / 2
    return blocks if enough else [encoder]


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and not any(isinstance(member, nn.ModuleList) for member in child.children()):
            yield from child.children()
        else:
            yield from _members(child)


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


# Takes a block's bytes; returns a function that brings them to the device.
_Keep = Callable[[Tensor], Callable[[], Tensor]]


def _in_host_memory(flat: Tensor) -> Callable[[], Tensor]:
    device = distributed.device()
    host = flat.pin_memory() if device.type == "cuda" else flat
    return lambda: host.to(device, non_blocking=True)


def _split_over(peers: distributed.Peers) -> _Keep:
    """Each of the peers keeps a share of the bytes on its device."""

    def keep(flat: Tensor) -> Callable[[], Tensor]:
        share = math.ceil(len(flat) / peers.size)
        padded = nn.functional.pad(flat, (0, share * peers.size - len(flat)))
        own = padded[peers.place * share :][:share].to(distributed.device(), copy=True)
        return lambda: distributed.all_gather(own, peers)

    return keep


class _Block:
    """Hooks that fetch one block's weights before it runs and free them afterwards."""

    def __init__(self, module: nn.Module, keep: _Keep) -> None:
        self._weights = list(module.parameters())
        self._shapes = [(p.dtype, p.shape) for p in self._weights]
        sizes = [p.numel() * p.element_size() for p in self._weights]
        ends = accumulate(math.ceil(size / _ALIGNMENT) * _ALIGNMENT for size in sizes)
        self._slices = [slice(b, b + s) for b, s in zip([0, *ends], sizes, strict=False)]
        flat = torch.zeros(self._slices[-1].stop, dtype=torch.uint8)
        for where, weight in zip(self._slices, self._weights, strict=True):
            flat[where] = weight.data.cpu().contiguous().flatten().view(torch.uint8)
        self._fetch = keep(flat)
        self._free()
        module.register_forward_pre_hook(lambda *_: self._fill())
        module.register_forward_hook(lambda *_: self._free(), always_call=True)

    def _fill(self) -> None:
        flat = self._fetch()
        for where, (dtype, shape), weight in self._each():
            weight.data = flat[where].view(dtype).view(shape)

    def _free(self) -> None:
        for _, (dtype, _), weight in self._each():
            weight.data = torch.empty(0, dtype=dtype, device=distributed.device())

    def _each(self) -> Iterator[tuple[slice, tuple[torch.dtype, torch.Size], Any]]:
        return zip(self._slices, self._shapes, self._weights, strict=True)
