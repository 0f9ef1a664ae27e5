"""Text towers: open_clip's own vectors from half of its model, and what is said where one lacks."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

from teachers.errors import TeacherError
from teachers.text_tower import TextTower, TextTowerConfig
from tests.tiny_clip import write_tiny_clip

TEXTS = ["a photo of a cat.", "two dogs", "a photo of a cat."]


def tower(model: Any, weights: str | None = None) -> TextTower:
    return TextTower(TextTowerConfig(model=str(model), weights=weights))


@pytest.mark.parametrize("siglip_text", [False, True])
def test_the_tower_alone_says_what_the_whole_model_says(tmp_path: Path, siglip_text: bool) -> None:
    whole = write_tiny_clip(tmp_path, siglip_text=siglip_text)
    alone = tower(tmp_path)
    with torch.no_grad():
        due = whole.encode_text(alone.tokenizer(TEXTS), normalize=True)
    assert torch.allclose(alone(TEXTS), due, atol=1e-6)
    assert torch.allclose(due[0], due[2], atol=1e-6)
    assert not torch.allclose(due[0], due[1], atol=1e-3)
    assert alone.dim == 16
    assert not any(p.requires_grad for p in alone.parameters())


def test_random_weights_are_the_same_every_time(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path)
    assert torch.equal(tower(tmp_path, "none")(TEXTS), tower(tmp_path, "none")(TEXTS))
    assert not torch.equal(tower(tmp_path, "none")(TEXTS), tower(tmp_path)(TEXTS))


def test_siglip_text_is_canonical_before_it_is_cut_into_tokens(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path, siglip_text=True)
    tokens = tower(tmp_path).tokenizer
    assert torch.equal(tokens(["A photo, of_a  CAT!"]), tokens(["a photo of a cat"]))
    write_tiny_clip(tmp_path)
    tokens = tower(tmp_path).tokenizer
    assert not torch.equal(tokens(["a photo, of a cat!"]), tokens(["a photo of a cat"]))


def test_every_siglip_of_open_clip_asks_for_canonical_text() -> None:
    named = [name for name in open_clip.list_models() if "SigLIP" in name]
    assert len(named) >= 20
    for name in named:
        config = open_clip.get_model_config(name)
        assert config is not None
        assert config["text_cfg"]["tokenizer_kwargs"] == {"clean": "canonicalize"}, name


def test_siglip_2_by_name_gives_its_tokenizer_canonical_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def from_pretrained(name: str, **_: Any) -> Any:
        def tokenize(texts: list[str], **options: Any) -> Any:
            seen.append((name, texts, options["max_length"], options["padding"]))
            return SimpleNamespace(input_ids=torch.zeros(len(texts), 64, dtype=torch.long))

        return tokenize

    fake = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with torch.device("meta"):
        named = tower("ViT-B-16-SigLIP2", "webli")
    assert named.dim == 768
    named.tokenizer(["A Photo, of a CAT!"])
    assert seen == [("timm/ViT-B-16-SigLIP2", ["a photo of a cat"], 64, "max_length")]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TeacherError, match="'ViT-B-16-SigLIP2' requires .*pip install"):
        tower("ViT-B-16-SigLIP2", "none")


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no file named tokenizer.json")


def test_a_tokenizer_that_is_not_here_says_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    with pytest.raises(TeacherError, match=r"timm/ViT-B-16-SigLIP2.*give that as text.model"):
        tower("ViT-B-16-SigLIP2", "none")
    write_tiny_clip(tmp_path)
    with pytest.raises(TeacherError, match=r"holds no readable tokenizer .*no file named .*copy"):
        tower(tmp_path)


@pytest.mark.parametrize("name", ["clip_ti16_128", "siglip_ti16_128"])
def test_the_shipped_teachers_have_no_text_tower(name: str) -> None:
    with pytest.raises(TeacherError, match=r"safetensors holds no text tower .*the whole model"):
        tower(name)


def test_a_text_tower_of_another_library_is_refused() -> None:
    with pytest.raises(TeacherError, match="a text tower of Hugging Face's transformers"):
        tower("roberta-ViT-B-32", "none")
