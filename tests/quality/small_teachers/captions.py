"""Captions made of class names, and the small text tower that encodes them during training.

The tower is open_clip's text transformer with a vocabulary of the few hundred words that occur. It
is not saved.
"""

import re

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

CONTEXT = 12
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a blurry photo of a {}",
    "a close up of a {}",
    "a cropped photo of a {}",
    "one {} in the picture",
    "a small {}",
    "a large {}",
)


def split_words(text: str) -> list[str]:
    """The words of a caption, in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


class Captions:
    """Draws a caption for each class: a random template around a random synonym.

    Args:
        names: comma-separated synonyms of each class, in the order of the labels.
    """

    def __init__(self, names: list[str]) -> None:
        self.synonyms = [[s.strip() for s in name.split(",")] for name in names]
        words = {w for text in (*TEMPLATES, *names) for w in split_words(text)}
        # 0 pads. The end token has the largest number: open_clip's tower pools at the argmax.
        self.numbers = {word: i for i, word in enumerate(sorted(words), start=1)}
        self.end = len(self.numbers) + 1

    def encode(self, text: str) -> list[int]:
        """Token numbers of a caption, with the end token, padded to `CONTEXT`."""
        numbers = [self.numbers[word] for word in split_words(text)][: CONTEXT - 1]
        return [*numbers, self.end, *[0] * (CONTEXT - 1 - len(numbers))]

    def draw(self, generator: torch.Generator) -> Tensor:
        """Token numbers of one random caption for each class, (classes, `CONTEXT`) int64."""
        rows = []
        for synonyms in self.synonyms:
            a, b = torch.randint(1 << 30, (2,), generator=generator).tolist()
            template = TEMPLATES[a % len(TEMPLATES)]
            rows.append(self.encode(template.format(synonyms[b % len(synonyms)])))
        return torch.tensor(rows)

    def build_tower(self, embed_dim: int) -> TextTransformer:
        """A text tower with random weights: (N, `CONTEXT`) -> (N, embed_dim)."""
        return TextTransformer(
            context_length=CONTEXT,
            vocab_size=self.end + 1,
            width=128,
            heads=2,
            layers=2,
            output_dim=embed_dim,
            pool_type="argmax",
        )
