"""Text towers with some of CLIP's words: the file, the vectors, what is said of other words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.classification.text_side import TextConfig, text_identity
from teachers.build import build_teacher, parse_teacher
from teachers.compact_text import FILE, TABLE, TOKENS, read_compact_text, save_compact_text
from teachers.errors import TeacherError
from teachers.text_tower import TextTower, TextTowerConfig
from tests.class_tree import write_colours
from tests.tiny_clip import write_tiny_clip

TEXTS = ["a red cat.", "the blue dog", "a red cat."]
MODEL = "open_clip_model.safetensors"
Said = Callable[[], list[str]]


def write(folder: Path, *, siglip_text: bool = False) -> tuple[Any, Tensor]:
    """A tiny CLIP whose text tower lies beside it, with the words of TEXTS; the whole model."""
    whole = write_tiny_clip(folder, siglip_text=siglip_text)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS).unique()
    source = whole.text if siglip_text else whole
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(("visual", "logit_"))}
    state[TABLE] = state[TABLE][tokens]
    save_compact_text(folder / FILE, state, tokens)
    kept = {k: v for k, v in whole.state_dict().items() if k.startswith("visual.")}
    save_file(kept, folder / MODEL)
    return whole, tokens


def tower(model: Any, weights: str | None = None) -> TextTower:
    return TextTower(TextTowerConfig(model=str(model), weights=weights))


@pytest.mark.parametrize("siglip_text", [False, True])
def test_known_words_say_what_the_whole_tower_says(
    tmp_path: Path, said: Said, siglip_text: bool
) -> None:
    whole, tokens = write(tmp_path, siglip_text=siglip_text)
    small = tower(tmp_path)
    with torch.no_grad():
        due = whole.encode_text(small.tokenizer(TEXTS), normalize=True)
    assert torch.allclose(small(TEXTS), due, atol=2e-3)
    assert not torch.equal(small(TEXTS)[0], small(TEXTS)[1])
    assert said() == []
    assert small.weights_file == tmp_path / MODEL
    assert torch.equal(small.known, tokens)
    stored = load_file(tmp_path / FILE)
    assert stored.pop(TOKENS).dtype == torch.int32
    assert {each.dtype for each in stored.values()} == {torch.float16}
    named = tower(tmp_path, str(tmp_path / MODEL))
    assert torch.equal(named(TEXTS), small(TEXTS))
    assert torch.equal(tower(tmp_path, str(tmp_path / FILE))(TEXTS), small(TEXTS))


def test_other_words_are_the_mean_of_all_and_are_counted_once(tmp_path: Path, said: Said) -> None:
    write(tmp_path)
    small = tower(tmp_path)
    zebra = small.tokenizer(["zebra"])[0, 1]
    rows = small.text.token_embedding.weight
    assert torch.allclose(rows[zebra], rows[small.known].mean(0), atol=1e-5)
    assert torch.equal(small(["a red zebra"]), small(["a red yak"]))
    (message,) = said()
    assert (
        "1 of 5 tokens, 1 different, are none of the 10 that" in message
    )  # with the marks of begin and end
    assert "most often 'zebra'; each stands for the mean of" in message


def test_all_texts_of_a_benchmark_are_counted_together(tmp_path: Path, said: Said) -> None:
    write(tmp_path / "clip")
    root = write_colours(tmp_path / "set")
    names = tmp_path / "names.txt"
    names.write_text("blue\ngreen\nred\n")  # only green is unknown
    entry = {
        "kind": "zero_shot",
        "dataset": {"kind": "class_folders", "root": str(root)},
        "class_names": str(names),
        "templates": ["a {}.", "the {}"],
        "text": {"model": str(tmp_path / "clip")},
    }
    encoder = build_teacher(parse_teacher({"kind": "dfn_clip", "model": str(tmp_path / "clip")}))
    said()
    measured = build_benchmark(parse_benchmark(entry)).measure(encoder, 0, tmp_path)
    assert measured.protocol["classes"] == 3
    (message,) = said()  # neither is the tower said to be from another file
    assert "2 of 27 tokens" in message
    assert "'green'" in message


def test_the_name_of_a_shipped_teacher_finds_its_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "clip_ti")
    monkeypatch.setattr("teachers.open_clip_source.SHIPPED", tmp_path)
    monkeypatch.setattr("distill.benchmarks.classification.text_side.SHIPPED", tmp_path)
    small = tower("clip_ti")
    assert small.known is not None
    config = TextConfig.model_validate({"kind": "zero_shot", "text": {"model": "clip_ti"}})
    before = text_identity(config)
    state = load_file(tmp_path / "clip_ti" / FILE)
    save_compact_text(
        tmp_path / "clip_ti" / FILE,
        {k: 2 * v for k, v in state.items() if k != TOKENS},
        state[TOKENS],
    )
    assert text_identity(config) != before


def test_a_folder_with_a_text_tower_still_has_one_file_of_the_model(
    tmp_path: Path, said: Said
) -> None:
    write(tmp_path)
    build_teacher(parse_teacher({"kind": "dfn_clip", "model": str(tmp_path)}))
    assert said() == []


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([3, 2, 1], "expected increasing numbers below 49408 .* got 1 to 3"),
        ([1, 2, 49408], "expected increasing numbers below 49408 .* 49408; was it written for"),
        ([-1, 2, 3], "expected increasing numbers"),
        ([1, 2], r"a number in tokens for each row .* \(2,\) of torch.int32 for \(3, 16\)"),
    ],
)
def test_numbers_that_are_not_those_of_the_rows_are_refused(
    tmp_path: Path, tokens: list[int], message: str
) -> None:
    stored = {TABLE: torch.rand(3, 16), TOKENS: torch.tensor(tokens, dtype=torch.int32)}
    save_file(stored, tmp_path / FILE)
    with pytest.raises(TeacherError, match=message):
        read_compact_text(tmp_path / FILE, 49408)
    with pytest.raises(TeacherError, match=TOKENS):
        save_compact_text(tmp_path / FILE, stored, torch.arange(4))


def test_rows_need_clips_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["vocab_size"] == 49408
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: object())
    with pytest.raises(TeacherError, match=r"words of CLIP's tokenizer, .* another one, object"):
        tower(tmp_path)
