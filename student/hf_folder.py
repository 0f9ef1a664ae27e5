"""Reads the trunk of a student in a folder for transformers, as `--format hf` of the export writes.

`model.safetensors` there has the names that the RADIO family has on Hugging Face's hub, which
transformers, vLLM and RADIO's readers load. The student's heads, config and targets are beside it:
`heads.safetensors` is a student's file whose header refers to that trunk.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import lfs_hint
from student.errors import StudentError

CONFIG, MODEL, HEADS = "config.json", "model.safetensors", "heads.safetensors"
TRUNK = "trunk"  # the entry of the heads' header that names the file of the trunk

PREFIX = "radio_model.model."
BESIDE = ("radio_model.input_conditioner.", "radio_model.summary_idxs")  # the config has them
EMBEDDER = "patch_generator.embedder.weight"
TABLE = "patch_generator.pos_embed"
TOKENS = "patch_generator.cls_token.token"

# LayerScale as transformers saves it, and the linear layer whose output it multiplies.
_SCALE = re.compile(r"(blocks\.\d+\.)layer_scale([12])\.lambda1")
SCALED = {"1": "attn.proj", "2": "mlp.fc2"}


def read_trunk(path: Path, num_class_tokens: int) -> dict[str, Tensor]:
    """Reads a trunk by a student's names.

    transformers' LayerScale, which it saves even where it does nothing, is folded, see
    `fold_scale`.

    Args:
        path: `model.safetensors`.
        num_class_tokens: the other prefix tokens are registers.

    Raises:
        StudentError: no such file, it is damaged, or it has other names.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith(BESIDE)]  # noqa: SIM118
            other = [name for name in names if not name.startswith(PREFIX)]
            if other:
                raise StudentError(
                    f"{path} holds {other[0]}, and a trunk's names start with {PREFIX}; where "
                    "transformers wrote it, save it again without save_original_format=False"
                )
            # Cloned to be aligned in memory, as `storage.read_student` does.
            trunk = {n.removeprefix(PREFIX): file.get_tensor(n).clone() for n in names}
    except (SafetensorError, OSError) as error:
        raise StudentError(
            f"{path}, the trunk of {path.with_name(HEADS).name}, cannot be read: {error}"
            f"{lfs_hint(path)}"
        ) from None
    missing = [name for name in (EMBEDDER, TABLE, TOKENS) if name not in trunk]
    if missing:
        raise StudentError(f"{path} has no {PREFIX}{missing[0]}; it is not a student's trunk")
    trunk = _without_scales(trunk)
    table, tokens = trunk.pop(TABLE), trunk.pop(TOKENS)
    parts = {
        "embedding.projection.weight": trunk.pop(EMBEDDER),
        "embedding.positions": rearrange(
            table, "1 (y x) c -> y x c", y=math.isqrt(table.shape[1])
        ).contiguous(),
        "embedding.class_tokens": tokens[:num_class_tokens].clone(),
        "embedding.registers": tokens[num_class_tokens:].clone(),
        **trunk,
    }
    return {f"trunk.{name}": value for name, value in parts.items() if value.numel()}


def _without_scales(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {name: value for name, value in trunk.items() if not _SCALE.fullmatch(name)}
    for name, scale in trunk.items():
        if found := _SCALE.fullmatch(name):
            linear = f"{found[1]}{SCALED[found[2]]}"
            for part in ("weight", "bias"):
                result[f"{linear}.{part}"] = fold_scale(trunk[f"{linear}.{part}"], scale)
    return result


def fold_scale(values: Tensor, scale: Tensor) -> Tensor:
    """Multiplies the rows of a linear layer's weight, or its bias, in float32.

    Args:
        values: (C, in) or (C,).
        scale: (C,), of LayerScale after the layer.

    Returns:
        The product, in the dtype of `values`; `values` themselves, bit for bit, where all are 1.
    """
    product = values.float() * scale.float().view(-1, *[1] * (values.ndim - 1))
    return product.to(values.dtype)
