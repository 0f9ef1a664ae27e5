"""The text towers of CLIP and SigLIP models, for zero-shot classification and retrieval.

Only the text tower is built and read. open_clip's tokenizer cleans captions as in training
(SigLIP 2: lower case, without punctuation).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_text_tower  # the only way to build no vision tower
from safetensors import safe_open
from torch import Tensor, nn

from teachers.compact_text import FILE, is_compact, read_compact_text
from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.files import OPEN_CLIP_SETS
from teachers.messages import say_once
from teachers.open_clip_source import OpenClipSource, find_source, locate_weights
from teachers.weights import download_failed, load_strictly, read_tensors, seeded, shorten

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt")
# Names of CLIP's text tower in models without the prefix `text.`
_LOOSE = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")


class TextTowerConfig(StrictConfig):
    """The model of a text tower.

    Attributes:
        model: an open_clip name, or a directory in hub layout, with its tokenizer if needed.
        weights: as in `OpenClipConfig`.
    """

    model: str
    weights: str | None = None


class TextTower(nn.Module):
    """A frozen text encoder with its tokenizer.

    Args:
        config: model and weights.

    Attributes:
        tokenizer: open_clip's, from texts to token numbers (N, context).
        dim: D of the vectors.
        weights_file: of the model, which has the tower unless it lies beside it, see
            `compact_text`; None for random weights.
        known: (V,) the tokens that it knows; None for all.

    Raises:
        TeacherError: no such model, weights without a text tower, or a missing tokenizer.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        source = find_source(config.model, config.weights)
        self.weights_file = path = locate_weights(source)
        self.dim: int = source.model_cfg["embed_dim"]
        text_cfg = source.model_cfg.get("text_cfg")
        if not isinstance(text_cfg, dict):
            raise TeacherError(f"text.model: {config.model!r} has no text tower: no text_cfg")
        if text_cfg.get("hf_model_name"):
            raise TeacherError(
                f"text.model: {config.model!r} has a text tower of Hugging Face's transformers; "
                "only open_clip's own are supported"
            )
        self.tokenizer = _load_tokenizer(source)
        with seeded(loaded=path is not None):
            self.text = _build_text_tower(
                self.dim, text_cfg, source.model_cfg.get("quick_gelu", False)
            )
        self._name = config.model
        self.known: Tensor | None = None
        if path is not None:
            self._load(_text_file(path), self.tokenizer)
        self.eval().requires_grad_(False)

    def _load(self, path: Path, tokenizer: Any) -> None:
        """Loads a file with the whole table, or with some of its rows."""
        if not is_compact(path):
            load_strictly(self.text, _text_tensors(path), str(path))
            return
        if not isinstance(tokenizer, open_clip.SimpleTokenizer):
            raise TeacherError(
                f"text: the rows of {path} are words of CLIP's tokenizer, and the config beside it "
                f"names another one, {type(tokenizer).__name__}"
            )
        tensors, self.known = read_compact_text(path, self.text.vocab_size)
        load_strictly(self.text, tensors, str(path))

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Vectors (N, D) of token numbers (N, context); the signature is open_clip's."""
        self._say_unknown(tokens)
        vectors = self.text(tokens).float()
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of texts."""
        device = next(self.text.parameters()).device
        return self.encode_text(self.tokenizer(list(texts)).to(device), normalize=True)

    def say_unknown(self, texts: Sequence[str]) -> None:
        """Says once how many of the tokens of all texts the tower was not trained on."""
        if self.known is not None:
            self._say_unknown(self.tokenizer(list(texts)))

    def _say_unknown(self, tokens: Tensor) -> None:
        if self.known is None:
            return
        missing = ~torch.isin(tokens.cpu(), self.known)
        if not missing.any():
            return
        numbers = tokens.cpu()[missing].unique(return_counts=True)
        often = numbers[0][numbers[1].argsort(descending=True, stable=True)[:5]]
        tokenizer: Any = self.tokenizer  # CLIP's, see `_load`
        words = [repr(tokenizer.decode([n]).strip()) for n in often.tolist()]
        of_all = f"{int(missing.sum())} of {int((tokens != 0).sum())}"
        say_once(
            f"text {self._name}: {of_all} tokens, {len(numbers[0])} different, are none of the "
            f"{len(self.known)} that it was trained on, most often {', '.join(words)}; each stands "
            "for the mean of all",
            f"text {self._name}: unknown",
        )


def _text_file(path: Path) -> Path:
    """The file with the tower of a model's weights: itself, or the one beside it."""
    beside = path.parent / FILE
    if path == beside or not beside.is_file() or _has_text(path):
        return path
    return beside


def _has_text(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return True  # too slow to look: a pickled one is read whole
    with safe_open(path, framework="pt") as file:
        return any(name.startswith(("text.", *_LOOSE)) for name in file.keys())  # noqa: SIM118


def _text_tensors(path: Path) -> dict[str, Tensor]:
    """The text tower's tensors of a checkpoint, without their prefix."""
    tensors = read_tensors(path, order=OPEN_CLIP_SETS)
    inside = {k.removeprefix("text."): v for k, v in tensors.items() if k.startswith("text.")}
    if inside:
        return inside
    loose = {k: v for k, v in tensors.items() if k.startswith(_LOOSE)}
    if not loose:
        raise TeacherError(
            f"text: {path} holds no text tower (no text.* or token_embedding.*); give the weights "
            "of the whole model"
        )
    return loose


def _load_tokenizer(source: OpenClipSource) -> Callable[[list[str]], Tensor]:
    name = source.model if source.folder is None else f"local-dir:{source.folder}"
    try:
        tokenizer: Any = open_clip.get_tokenizer(name)
    except ImportError as error:
        raise TeacherError(
            f"text.model: the tokenizer of {source.model!r} requires another package ({error}); "
            "`pip install transformers sentencepiece`"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        asked = source.model_cfg["text_cfg"].get("hf_tokenizer_name") or source.model
        if source.folder is not None:
            raise TeacherError(
                f"text.model: {source.folder} holds no readable tokenizer "
                f"({shorten(str(error))}); copy the tokenizer's files of {asked} there"
            ) from None
        raise download_failed(
            f"the tokenizer of open_clip {source.model!r} ({asked})",
            "Put the model into a directory with its open_clip_config.json and the tokenizer's "
            f"files (`hf download {asked} --local-dir DIR`), and give that as text.model",
            error,
        ) from None
    _check_tokenizer(source, tokenizer)
    return tokenizer


def _check_tokenizer(source: OpenClipSource, tokenizer: Any) -> None:
    """Checks a tokenizer that nobody named; says which one that is where others are at hand.

    Raises:
        TeacherError: it has words that the tower does not know.
    """
    text_cfg, folder = source.model_cfg["text_cfg"], source.folder
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        return
    known = text_cfg.get("vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > known:
        raise TeacherError(
            f"text.model: the config of {source.model!r} names no tokenizer, and CLIP's own has "
            f"{tokenizer.vocab_size} words where the text tower has {known}; set "
            "text_cfg.hf_tokenizer_name in its config, with the tokenizer's files beside it"
        )
    beside = [name for name in _TOKENIZER_FILES if folder and (folder / name).is_file()]
    if beside:
        say_once(
            f"text {source.model}: tokenizer CLIP's own assumed, as open_clip does: its config "
            f"names no hf_tokenizer_name, so {', '.join(beside)} in {folder} are not read"
        )
