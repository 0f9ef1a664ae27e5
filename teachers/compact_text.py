"""The file of a small text tower: weights in float16, and only the words that it was trained on.

`text.safetensors`, beside `open_clip_model.safetensors` in a folder in open_clip's hub layout,
holds

- the tensors of open_clip's `TextTransformer` under its names, in float16, but of
  `token_embedding.weight` only V rows, (V, width);
- `tokens`, (V,) int32, increasing: the numbers of these rows in the table of CLIP's tokenizer
  (49,408 words).

The folder's `text_cfg` describes the whole tower. A word without a row gets the mean of the others:
it then says no more than that there is a word. The table is most of a small tower: 12.6 MB in
float16 at 128 channels, of which captions of 1,000 classes need a tenth.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from teachers.errors import TeacherError
from teachers.files import save_tensors
from teachers.weights import read_tensors

FILE = "text.safetensors"
TABLE, TOKENS = "token_embedding.weight", "tokens"


class CompactText(NamedTuple):
    """A text tower's tensors.

    Attributes:
        tensors: of the whole tower, float32; words without a row have the mean of the others.
        tokens: (V,) int64, the numbers of the words that have a row.
    """

    tensors: dict[str, Tensor]
    tokens: Tensor


def save_compact_text(path: Path, tensors: Mapping[str, Tensor], tokens: Tensor) -> None:
    """Writes a text tower, whole or not at all.

    Args:
        path: the file.
        tensors: of a `TextTransformer` whose table has a row for each of `tokens`.
        tokens: (V,) increasing numbers in CLIP's table.

    Raises:
        TeacherError: the rows do not fit the numbers.
    """
    _check(tensors[TABLE], tokens, str(path))
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_tensors(path, halves | {TOKENS: tokens.int()}, {})


def is_compact(path: Path) -> bool:
    """Whether a file is a text tower with some of its rows."""
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, framework="pt") as file:
        return {TABLE, TOKENS} <= set(file.keys())


def read_compact_text(path: Path, vocabulary: int) -> CompactText:
    """Reads a text tower and fills its table.

    Args:
        path: the file.
        vocabulary: words of the whole table.

    Raises:
        TeacherError: the file is damaged, or its numbers are not those of such rows.
    """
    stored = read_tensors(path)
    numbers = stored.pop(TOKENS)
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    _check(tensors[TABLE], numbers, str(path), vocabulary)
    tokens, rows = numbers.long(), tensors[TABLE]
    table = rows.mean(0).repeat(vocabulary, 1)
    table[tokens] = rows
    return CompactText(tensors | {TABLE: table}, tokens)


def _check(rows: Tensor, tokens: Tensor, where: str, vocabulary: int | None = None) -> None:
    whole = not tokens.is_floating_point() and tokens.ndim == 1 and len(tokens) > 0
    if not whole or rows.ndim != 2 or len(rows) != len(tokens):
        raise TeacherError(
            f"text: {where}: expected a number in {TOKENS} for each row of {TABLE}, got "
            f"{tuple(tokens.shape)} of {tokens.dtype} for {tuple(rows.shape)}"
        )
    end = torch.iinfo(torch.int32).max if vocabulary is None else vocabulary
    if int(tokens[0]) < 0 or int(tokens[-1]) >= end or bool((tokens.diff() <= 0).any()):
        raise TeacherError(
            f"text: {where}: expected increasing numbers below {end} in {TOKENS}, got "
            f"{int(tokens.min())} to {int(tokens.max())}; was it written for another tokenizer?"
        )
