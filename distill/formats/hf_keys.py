"""Checks every tensor of an export for transformers against what its readers do with it.

transformers renames the tensors on load and warns of those that it does not know; vLLM reads those
that start with `radio_model.`, and ignores in silence what it has no parameter for, so that a file
could load there and give other features. A tensor that is not in `keys` is therefore an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from distill.runtime.errors import RecipeError
from student.hf_folder import CONFIG, EMBEDDER, PREFIX, TABLE, TOKENS

_LAYER_SCALE = (".ls1.", ".ls2.", "layer_scale")


class Key(NamedTuple):
    """A tensor.

    Attributes:
        shape: as in the file.
        transformers: the names that it has there; of a fused qkv three, for equal parts.
        vllm: whether vLLM reads it, or skips it because the config has its content.
    """

    shape: tuple[int, ...]
    transformers: tuple[str, ...]
    vllm: Literal["reads", "skips"] = "reads"


def keys(config: Mapping[str, Any]) -> dict[str, Key]:
    """The tensors of `model.safetensors`, by name, for the content of `config.json`."""
    width, patch = config["hidden_size"], config["patch_size"]
    side = config["max_img_size"] // patch
    prefix = config["num_cls_tokens"] + config["num_registers"]
    summaries = (len(config["summary_idxs"]),)
    found = {
        "radio_model.summary_idxs": Key(summaries, ("summary_idxs",), "skips"),
        f"{PREFIX}{EMBEDDER}": Key((width, 3 * patch**2), ("embeddings.patch_projection.weight",)),
        f"{PREFIX}{TABLE}": Key((1, side**2, width), ("embeddings.position_embedding",)),
        f"{PREFIX}{TOKENS}": Key((prefix, width), ("embeddings.cls_register_token",)),
    }
    for part in ("norm_mean", "norm_std"):
        name = f"input_conditioner.{part}"
        found[f"radio_model.{name}"] = Key((3, 1, 1), (name,), "skips")
    for index in range(config["num_hidden_layers"]):
        found |= _block(index, width, int(width * config["mlp_ratio"]))
    return found


def _block(index: int, width: int, mlp_dim: int) -> dict[str, Key]:
    ours, theirs = f"{PREFIX}blocks.{index}.", f"encoder.layer.{index}."
    found = {
        f"{ours}{norm}.{part}": Key((width,), (f"{theirs}{norm}.{part}",))
        for norm in ("norm1", "norm2")
        for part in ("weight", "bias")
    }
    split = [f"attention.{part}_proj" for part in "qkv"]
    for linear, rows, columns, names in (
        ("attn.qkv", 3 * width, width, split),
        ("attn.proj", width, width, ["attention.o_proj"]),
        ("mlp.fc1", mlp_dim, width, ["mlp.fc1"]),
        ("mlp.fc2", width, mlp_dim, ["mlp.fc2"]),
    ):
        for part, shape in (("weight", (rows, columns)), ("bias", (rows,))):
            became = tuple(f"{theirs}{name}.{part}" for name in names)
            found[f"{ours}{linear}.{part}"] = Key(shape, became)
    return found


def check_keys(path: Path, config: Mapping[str, Any]) -> None:
    """Checks that a file holds the tensors that its config describes, and nothing else.

    Args:
        path: `model.safetensors`.
        config: the content of the `config.json` beside it.

    Raises:
        RecipeError: a tensor too many or too few, or of another shape; numbers of tokens that
            vLLM would derive otherwise; a header that loaders refuse; a config without a field.
    """
    expected = _expected(path.with_name(CONFIG), config)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            came = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if header.get("format") != "pt":
        raise RecipeError(
            f"{path}: its header has format {header.get('format')!r}; loaders expect 'pt'"
        )
    for name, shape in came.items():
        if name not in expected:
            raise RecipeError(f"{path}: {_unknown(name)}")
        if shape != expected[name]:
            raise RecipeError(
                f"{path}: {name} has shape {shape}, and by its config.json {expected[name]}"
            )
    if missing := [name for name in expected if name not in came]:
        raise RecipeError(f"{path}: {missing[0]} is missing, and {len(missing) - 1} more")


def _expected(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, after a check of the config at `path`."""
    try:
        _check_args(path, config)
        return {name: key.shape for name, key in keys(config).items()}
    except KeyError as error:
        raise RecipeError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: a field is not what an export writes: {error}") from None


def _unknown(name: str) -> str:
    if any(part in name for part in _LAYER_SCALE):
        return (
            f"{name} is LayerScale, which transformers or vLLM would leave out in silence; fold it "
            "into the layer before"
        )
    return f"{name} is a tensor that transformers would report and vLLM ignore in silence"


def _check_args(path: Path, config: Mapping[str, Any]) -> None:
    """Checks that vLLM's rules find the numbers in `args` that transformers finds in its fields."""
    args = config["args"]
    classes = len({each["name"] for each in args["teachers"]})
    multiple = args["register_multiple"]
    registers = multiple - classes % multiple if multiple else 0
    for what, came, field in (
        ("class tokens", classes, "num_cls_tokens"),
        ("registers", registers, "num_registers"),
        ("pixels of the table", args["cpe_max_size"], "max_img_size"),
    ):
        if came != config[field]:
            raise RecipeError(f"{path}: {came} {what} by args, {config[field]} by {field}")
    if config["max_img_size"] % config["patch_size"]:
        raise RecipeError(
            f"{path}: max_img_size {config['max_img_size']} is no multiple of the patch size "
            f"{config['patch_size']}, and readers round it differently"
        )
