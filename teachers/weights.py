"""Finds, reads and strictly loads the weights of teachers.

`none` means random weights from a fixed seed. On the meta device no weights are read.
"""

import argparse
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from math import isinf, isnan
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data.files import lfs_hint
from teachers.errors import TeacherError
from teachers.files import choose_state
from teachers.messages import took

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# What trainers, and our exports for transformers, leave beside a model's weights.
_INDICES = (".safetensors.index.json", ".bin.index.json")  # of weights in several parts
_OTHER_FILES = (
    *("optimizer", "scheduler", "scaler", "training_args", "rng_state", "adapter_model"),
    "heads.safetensors",
    "text.safetensors",  # of `teachers.compact_text`
)
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
    """A weights file: `path` itself, or the file in that directory; says which of several.

    Args:
        path: a file or a directory.
        names: file names of the hub layout, the preferred one first.

    Raises:
        TeacherError: another kind of file, or no or several files in the directory.
    """
    if path.is_dir():
        found = weights_in(path)
        for name in names:
            if name in found:
                took(f"weights {path}", name, found, "name another as weights")
                return path / name
        if any(name.endswith(".index.json") for name in found):
            raise TeacherError(
                f"{path} holds weights in several parts, {found}, which are not read; save them as "
                "one file"
            )
        if len(found) != 1:
            came = f"{len(found)} weights files, {found}" if found else "no weights file"
            raise TeacherError(f"{path} holds {came}; name one file, or keep one of {list(names)}")
        return path / found[0]
    if path.suffix not in SUFFIXES:
        raise TeacherError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    return path


def weights_in(folder: Path) -> list[str]:
    """The names of the weights in a directory; of weights in parts, that of their index only."""
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    indices = [name for name in files if name.endswith(_INDICES)]
    parts = tuple(name.partition(".")[0] + "-" for name in indices)
    whole = [
        name
        for name in files
        if Path(name).suffix in SUFFIXES and not name.startswith((*_OTHER_FILES, *parts))
    ]
    return whole + indices


def read_tensors(path: Path, *, prefix: str = "", order: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, without it, on the CPU.

    Only tensors are unpickled. Of several sets of weights in the file one is read, see
    `choose_state` for the rule and `order`. A `module.` from data-parallel training and an
    `_orig_mod.` from compilation are dropped.

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
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training
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
    state = choose_state(loaded, str(path), order)
    tensors = {
        _bare(key): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    kept = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return _not_empty(kept, path, prefix, [k for k, v in state.items() if isinstance(v, Mapping)])


def _bare(name: str) -> str:
    """The name of a tensor without what wrappers put before it."""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # in either order
        name = name.removeprefix(wrapper)
    return name


def _not_empty(
    tensors: dict[str, Tensor], path: Path, prefix: str, sets: Sequence[str] = ()
) -> dict[str, Tensor]:
    if not tensors:
        named = f" named {prefix}*" if prefix else ""
        inside = f", only {list(sets)}; save the one that you mean alone" if sets else ""
        raise TeacherError(f"{path} holds no tensors{named}{inside}")
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


def check_finite(module: nn.Module) -> None:
    """Checks that no weight is NaN or infinite, in one pass over each; nothing on the meta device.

    Raises:
        TeacherError: names the first such tensor, how many of its values, and how many others.
    """
    wrong = []
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        floating = tensor.is_floating_point() and tensor.element_size() > 1  # no minimum of float8
        if tensor.is_meta or not floating or not tensor.numel():
            continue
        low, high = (float(each) for each in tensor.detach().aminmax())  # NaN if any value is
        mask = not isinstance(tensor, nn.Parameter)  # infinite where nothing is to be seen
        if isnan(low) or ((isinf(low) or isinf(high)) and not mask):
            wrong.append((name, tensor))
    if wrong:
        name, tensor = wrong[0]
        count = int((~tensor.detach().isfinite()).sum())
        others = f", and so are values of {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise TeacherError(
            f"weights: {count} of {tensor.numel()} values of {name} in {type(module).__name__} are "
            f"NaN or infinite{others}; is the file damaged, or did its training diverge?"
        )


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
