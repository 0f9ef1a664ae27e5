"""Identifies a teacher by everything that its features depend on."""

import hashlib
from itertools import chain

import torch

from teachers.teacher import Teacher

# They change no feature; the number of layers follows from the modules, which are hashed.
_IRRELEVANT = {"chunk_size", "num_layers", "training", "_is_torch_compile"}
_BLOCK = 1 << 24  # elements hashed at once: bounds what is copied from the device


def teacher_fingerprint(teacher: Teacher) -> str:
    """A hash of the classes, their plain attributes, the spec and every weight of a built teacher.

    Plain attributes (numbers, strings, tuples of them) hold the options of the config. Each tensor
    is hashed with its name, type and shape, in the order of names, so upsamplers and precision
    count: the same weights in bfloat16 give other features. `chunk_size` and the device do not.

    A class that was renamed or moved keeps its fingerprints by its former full name in a class
    attribute `fingerprinted_as`: files of trained upsamplers, caches and statistics stay valid.

    Returns:
        64 hexadecimal digits (SHA-256). A 630 million parameter ViT-H takes a few seconds.
    """
    digest = hashlib.sha256()
    for name, module in teacher.named_modules():
        digest.update(f"{name}:{_class_name(type(module))};".encode())
        if isinstance(module, Teacher):
            digest.update(f"{module.spec}{module.normalization}{module.compute_dtype};".encode())
        plain = {k: v for k, v in vars(module).items() if k not in _IRRELEVANT and _is_plain(v)}
        digest.update(repr(sorted(plain.items())).encode())
    tensors = chain(teacher.named_parameters(), teacher.named_buffers())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)};".encode())
        for block in tensor.detach().flatten().split(_BLOCK):
            digest.update(block.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _class_name(kind: type) -> str:
    own = f"{kind.__module__}.{kind.__qualname__}"
    return str(vars(kind).get("fingerprinted_as", own))  # not inherited


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))
