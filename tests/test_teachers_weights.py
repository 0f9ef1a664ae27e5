"""Where a file or a folder offers several weights, the library's rule is followed and said."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.formats.source import read_source
from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.files import OPEN_CLIP_SETS, TIMM_SETS
from teachers.messages import hushed, say_once
from teachers.timm_source import timm
from teachers.upsamplers.trained import SHIPPED, load_upsampler
from teachers.weights import find_weights, read_tensors, weights_in
from tests.tiny_clip import write_tiny_clip

Said = Callable[[], list[str]]


def one(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2,), value)}


def taken(path: Path, content: Any, order: tuple[str, ...] = ()) -> float:
    torch.save(content, path)
    return float(read_tensors(path, order=order)["weight"][0])


@pytest.mark.parametrize(
    "names, order, chosen",
    [
        (("state_dict", "state_dict_ema"), TIMM_SETS, "state_dict_ema"),
        (("model", "model_ema"), TIMM_SETS, "model_ema"),
        (("model", "state_dict"), TIMM_SETS, "state_dict"),
        (("state_dict_ema", "state_dict"), OPEN_CLIP_SETS, "state_dict"),
        (("model", "ema"), (), "model"),
        (("student", "teacher"), (), "teacher"),
        (("student", "module"), TIMM_SETS, "module"),
        (("weights_a", "state_dict"), (), "state_dict"),
    ],
)
def test_one_set_of_weights_is_read_by_the_librarys_rule_and_said(
    names: tuple[str, ...], order: tuple[str, ...], chosen: str, tmp_path: Path, said: Said
) -> None:
    path = tmp_path / "checkpoint.pth"
    content = {name: one(place) for place, name in enumerate(names)}
    assert taken(path, {"epoch": 3, **content, "optimizer": {"state": {}}}, order) == names.index(
        chosen
    )
    (line,) = said()
    assert line.startswith(f"weights {path}: took {chosen} of [{', '.join(names)}]")


def test_the_rule_for_timm_is_timms_own(tmp_path: Path) -> None:
    from timm.models import load_state_dict

    path = tmp_path / "checkpoint.pth"
    for count in range(1, len(TIMM_SETS) + 1):
        names = TIMM_SETS[-count:]
        content = {name: one(place) for place, name in enumerate(reversed(names))}
        own = taken(path, content, TIMM_SETS)
        assert own == load_state_dict(str(path))["weight"][0]


@pytest.mark.parametrize(
    "content",
    [
        one(1),
        {"state_dict": one(1), "epoch": 3, "args": Namespace(lr=1)},
        {"state_dict": {"module._orig_mod.weight": torch.ones(2)}},
        {"state_dict": {"model": one(1)}},
        {"state_dict_ema": None, "model": one(1)},
        {"params": one(1), "epoch": 3},
    ],
)
def test_a_single_set_is_read_without_a_word(content: Any, tmp_path: Path, said: Said) -> None:
    assert taken(tmp_path / "checkpoint.pth", content, TIMM_SETS) == 1
    assert said() == []


def test_sets_that_nobody_knows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"generator": one(1), "critic": one(2)}, path)
    with pytest.raises(TeacherError, match=r"no tensors, only \['generator', 'critic'\]; save"):
        read_tensors(path)


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).touch()
    return path


@pytest.mark.parametrize(
    "names, chosen",
    [
        (("pytorch_model.bin", "model.safetensors"), "model.safetensors"),
        (("other.safetensors", "model.safetensors"), "model.safetensors"),
        (
            ("model.safetensors", "model.safetensors.index.json",
             "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            "model.safetensors",
        ),
    ],
)  # fmt: skip
def test_one_file_of_a_folder_is_taken_and_said(
    names: tuple[str, ...], chosen: str, tmp_path: Path, said: Said
) -> None:
    folder = folder_of(tmp_path / "model", *names)
    assert find_weights(folder, ("model.safetensors", "pytorch_model.bin")).name == chosen
    (line,) = said()
    assert line.startswith(f"weights {folder}: took {chosen} of [")
    assert "-00001-" not in line


def test_what_a_trainer_left_beside_the_weights_is_no_candidate(tmp_path: Path, said: Said) -> None:
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "mine.pt")
    folder = folder_of(tmp_path / "model", *names)
    assert weights_in(folder) == ["mine.pt"]
    assert find_weights(folder, ()).name == "mine.pt"
    assert said() == []


@pytest.mark.parametrize(
    "names, message",
    [
        ((), "no weights file; name one file"),
        (("a.pt", "b.pt"), r"2 weights files, \['a.pt', 'b.pt'\]; name one file"),
        (
            ("model.safetensors.index.json", "model-00001-of-00001.safetensors"),
            "several parts, .*index.json.*save them as one file",
        ),
    ],
)
def test_a_folder_without_one_answer_is_refused(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        find_weights(folder_of(tmp_path / "model", *names), ("model.safetensors",))


def test_an_average_in_a_file_of_timm_is_the_teacher(tmp_path: Path, said: Said) -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    plain = network.state_dict()
    average = {name: value + 0.25 for name, value in plain.items()}
    part = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": {"depth": 1}}
    part["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(part))
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": plain, "state_dict_ema": average, "args": Namespace(lr=1)}, file)
    for weights in (None, str(file), str(tmp_path)):
        entry = {"kind": "timm", "model": str(tmp_path), "weights": weights}
        teacher: Any = build_teacher(parse_teacher(entry))
        assert torch.equal(teacher.network.norm.bias, average["norm.bias"])
    (line,) = said()
    assert line.startswith(f"weights {file}: took state_dict_ema of [state_dict, state_dict_ema]")


def test_a_file_of_open_clip_gives_what_open_clip_loads(tmp_path: Path, said: Said) -> None:
    model = write_tiny_clip(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    file.unlink()
    average = {name: value + 0.25 for name, value in model.state_dict().items()}
    content = {"state_dict": model.state_dict(), "state_dict_ema": average}
    torch.save(content, tmp_path / "open_clip_pytorch_model.bin")
    teacher: Any = build_teacher(parse_teacher({"kind": "dfn_clip", "model": str(tmp_path)}))
    own: Any = open_clip.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(teacher.visual.conv1.weight, own.visual.conv1.weight)
    (line,) = said()
    assert "took state_dict of [state_dict, state_dict_ema]" in line
    save_file(average, file)
    build_teacher(parse_teacher({"kind": "dfn_clip", "model": f"local-dir:{tmp_path}"}))
    (line,) = said()
    assert "took open_clip_model.safetensors of [open_clip_model.safetensors, open_clip_py" in line


def test_a_name_with_several_meanings_says_which_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_clip(tmp_path / "clip_ti16_128")
    write_tiny_clip(tmp_path / "ViT-B-32")
    shipped = build_teacher(parse_teacher({"kind": "dfn_clip", "model": "clip_ti16_128"}))
    assert shipped.spec.spatial_dim == 192
    own = build_teacher(parse_teacher({"kind": "dfn_clip", "model": "./clip_ti16_128"}))
    folder = build_teacher(parse_teacher({"kind": "dfn_clip", "model": "ViT-B-32"}))
    assert own.spec.spatial_dim == folder.spec.spatial_dim == 16
    first, second = said()
    assert "clip_ti16_128: took the shipped teacher of [the shipped teacher, the dir" in first
    assert "ViT-B-32: took the directory of [the directory, open_clip's model]" in second


def test_published_weights_of_a_name_without_a_tag_are_said(
    monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: create(*a, **k | {"pretrained": False})
    )
    monkeypatch.setattr("teachers.build.check_finite", lambda _: None)  # nothing was loaded
    build_teacher(parse_teacher({"kind": "timm", "model": "vit_tiny_patch16_224"}), device="cpu")
    (line,) = said()
    assert line == (
        "timm vit_tiny_patch16_224: took the tag augreg_in21k_ft_in1k of [augreg_in21k, "
        "augreg_in21k_ft_in1k], timm's default"
    )
    build_teacher(parse_teacher({"kind": "timm", "model": "vit_tiny_patch16_224.augreg_in21k"}))
    build_teacher(parse_teacher({"kind": "timm", "model": "vit_tiny_patch16_224"}), device="meta")
    assert said() == []


def test_weights_that_are_not_finite_are_one_message(tmp_path: Path) -> None:
    model = write_tiny_clip(tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["visual.transformer.resblocks.1.mlp.c_fc.weight"][0, :3] = torch.nan
    state["visual.ln_post.bias"][0] = torch.inf
    save_file(state, tmp_path / "open_clip_model.safetensors")
    message = (
        r"weights: 3 of 1024 values of visual.transformer.resblocks.1.mlp.c_fc.weight in DFNCLIP "
        "are NaN or infinite, and so are values of 1 more tensors"
    )
    with pytest.raises(TeacherError, match=message):
        build_teacher(parse_teacher({"kind": "dfn_clip", "model": str(tmp_path)}))


def test_a_file_with_the_name_of_an_upsampler_that_ships_is_said_to_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "clip_ti16_128_featsharp_2x"
    own = SHIPPED / "clip_ti16_128_featsharp_4x.safetensors"
    assert load_upsampler(name).factor == (2, 2)
    assert said() == []
    Path(name).write_bytes(own.read_bytes())
    assert load_upsampler(name).factor == (4, 4)
    (line,) = said()
    assert line.startswith(
        f"upsampler {name}: took the file of [the file, the upsampler that ships"
    )


def test_ranks_that_another_one_speaks_for_say_nothing(said: Said) -> None:
    with hushed(False), hushed(True):
        say_once("one")
    say_once("one")
    with hushed(False):
        say_once("two")
    assert said() == ["two"]


def test_a_run_with_the_config_of_a_radio_model_says_what_it_is_taken_for(
    tmp_path: Path, said: Said
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="no weights file"):
        read_source(tmp_path)
    (line,) = said()
    assert line.startswith(f"{tmp_path}: took its config.json of [its config.json, its checkpoin")
