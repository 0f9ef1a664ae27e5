"""Finds, reads and strictly loads the weights of teachers.

`none` means random weights from a fixed seed. On the meta device no weights are read.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data.files import lfs_hint
from teachers.errors import TeacherError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# The functions in which initialisers of torch, timm and open_clip spend their time.
_DRAWS = {
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    Tensor.erfinv_,
    Tensor.normal_,
    Tensor.uniform_,
}


def on_meta() -> bool:
    """Whether the default device is meta, where modules have no storage."""
    return torch.empty(0).device.type == "meta"


def without_storage(module: nn.Module) -> Any:
    """A copy on the meta device, in eval mode; the weights are not copied."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return deepcopy(module, memo).eval()


class _SkipInit(TorchFunctionMode):
    """Skips the random initialisation of weights, which stay uninitialised."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else options["tensor"]
        return func(*args, **options)


@contextmanager
def seeded(*, loaded: bool = False) -> Iterator[None]:
    """Seeds random initial weights; the caller's generator is untouched.

    Args:
        loaded: whether all weights are loaded strictly right after. Initialisation is then
            skipped, which takes 5 s for a ViT-H; weights that are not loaded stay uninitialised.
    """
    with torch.random.fork_rng(devices=[]), _SkipInit() if loaded else nullcontext():
        torch.manual_seed(0)
        yield


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        TeacherError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise TeacherError(
            f"{path} is missing: a local directory must hold its model's config"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TeacherError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TeacherError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def find_weights(path: Path, names: Sequence[str]) -> Path:
    """A weights file: `path` itself, or the file in that directory.

    Args:
        names: file names of the hub layout, the preferred one first.

    Raises:
        TeacherError: another kind of file, or no or several files in the directory.
    """
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if len(found) != 1:
            came = f"{len(found)} weights files" if found else "no weights file"
            raise TeacherError(f"{path} holds {came}; name one file, or keep one of {list(names)}")
        return found[0]
    if path.suffix not in SUFFIXES:
        raise TeacherError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    return path


def read_tensors(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, without it, on the CPU.

    Only tensors are unpickled. A `state_dict` or `model` inside the file is unwrapped, and a
    `module.` from data-parallel training is dropped.

    Raises:
        TeacherError: the file is damaged, holds other objects, or has no such tensor.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
                return _not_empty(
                    {k[len(prefix) :]: file.get_tensor(k) for k in keys}, path, prefix
                )
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError:
        raise TeacherError(
            f"{path} holds more than tensors, or is damaged; it is not unpickled. Save only the "
            f"state dict, preferably as .safetensors{lfs_hint(path)}"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise TeacherError(f"{path} cannot be read: {error}{lfs_hint(path)}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {
        key.removeprefix("module."): value
        for key, value in (loaded.items() if isinstance(loaded, Mapping) else ())
        if isinstance(value, Tensor)
    }
    kept = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return _not_empty(kept, path, prefix)


def _not_empty(tensors: dict[str, Tensor], path: Path, prefix: str) -> dict[str, Tensor]:
    if not tensors:
        named = f" named {prefix}*" if prefix else ""
        raise TeacherError(f"{path} holds no tensors{named}")
    return tensors


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads a state dict into a module, in its dtypes.

    Raises:
        TeacherError: names or shapes differ; the message has their origin, `where`.
    """
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise TeacherError(f"{where} does not fit the model: {shorten(str(error))}") from None


def shorten(message: str, limit: int = 400) -> str:
    """A library's message on one line, cut at `limit` characters."""
    line = " ".join(message.split())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def fetch(what: str, key: str) -> str:
    """How to download a repository or its file by hand, for the recipe's `key` with the path."""
    return (
        f"With network access, run `hf download {what} --local-dir DIR`, copy DIR here and give "
        f"that path as {key}"
    )


def download_failed(asked: str, local: str, error: Exception) -> TeacherError:
    """The error for weights `asked` that are neither cached nor can be downloaded.

    `local` says how to download them elsewhere and name that copy in a recipe.
    """
    from huggingface_hub import constants

    offline = " (offline: HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return TeacherError(
        f"{asked} is not in the cache {constants.HF_HUB_CACHE} and could not be downloaded"
        f"{offline}. {local}. The library's error: {shorten(str(error))}"
    )
