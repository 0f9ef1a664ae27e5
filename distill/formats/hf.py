"""Writes a student as a folder that transformers loads without code of ours: `--format hf`.

`AutoModel.from_pretrained(FOLDER)` of transformers 5.24 gives its built-in `RadioModel`, whose map,
summary and hidden states are the student's; `AutoImageProcessor` gives the preprocessing. vLLM
and RADIO's readers take the same file, see `hf_config` and `hf_keys`. The heads, for which that
class has no place, are in `heads.safetensors`: `student.load(FOLDER)` gives the whole student.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.files import write_text
from distill.formats.hf_config import best_size, hf_config, preprocessor_config
from distill.formats.hf_keys import check_keys
from distill.formats.model_card import relocatable
from distill.formats.radio import to_public
from distill.runtime.config import dump_yaml, parse_yaml
from distill.runtime.errors import RecipeError
from student.config import StudentConfig
from student.hf_folder import CONFIG, HEADS, MODEL, PREFIX, SCALED, TRUNK, fold_scale
from student.storage import FORMAT, StudentFile, student_header
from teachers.files import save_tensors

PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"
FILES = (CONFIG, MODEL, PREPROCESSOR, HEADS, CARD)


def for_hf(file: StudentFile) -> StudentFile:
    """The student as the format can hold it: LayerScale is folded into the layers before it.

    Raises:
        RecipeError: the format has no place for a part of the student; names the recipe's key.
    """
    config = file.config
    if not isinstance(config, StudentConfig):
        raise RecipeError(
            f"--format hf: holds a ViT only; this student has student.kind={config.kind}. Use "
            "safetensors or onnx"
        )
    if config.final_norm:
        raise RecipeError(
            "--format hf: transformers' RADIO has no norm after the last block, and this student "
            "was trained with student.final_norm=true; use safetensors, onnx or radio, or train "
            "with final_norm=false"
        )
    if config.isolated:
        raise RecipeError(
            "--format hf: student.isolated keeps other tokens from attending to the class token "
            f"of {', '.join(config.isolated)}, which the format cannot express; use safetensors"
        )
    file = file._replace(metadata=_relocatable(file.metadata))
    if config.layer_scale is None:
        return file
    state = dict(file.state_dict)
    for index in range(config.shape.depth):
        for number, linear in SCALED.items():
            block = f"trunk.blocks.{index}."
            scale = state.pop(f"{block}ls{number}.gamma")
            for part in ("weight", "bias"):
                name = f"{block}{linear}.{part}"
                state[name] = fold_scale(state[name], scale)
    config = config.model_copy(update={"layer_scale": None})
    return file._replace(config=config, state_dict=state)


def _relocatable(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without paths of the machine, as the folder is made to be published."""
    cut = {key: str(relocatable(value)) for key, value in metadata.items()}
    if "recipe" in metadata:
        cut["recipe"] = dump_yaml(relocatable(parse_yaml(metadata["recipe"], "recipe")))
    return cut


def save_hf(folder: Path, file: StudentFile) -> None:
    """Writes all files but the card into an empty folder.

    Args:
        folder: where to.
        file: the student, of `for_hf`.

    Raises:
        RecipeError: readers would do something else with a tensor than is meant.
    """
    size = best_size(file)
    config = hf_config(file, size)
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor_config(size))):
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
    save_tensors(folder / MODEL, _trunk(file, config["summary_idxs"]), {})
    check_keys(folder / MODEL, config)
    heads = {k: v for k, v in file.state_dict.items() if not k.startswith("trunk.")}
    header = student_header(file.config, file.targets, file.metadata)
    save_tensors(folder / HEADS, heads, header | {TRUNK: MODEL}, FORMAT)


def _trunk(file: StudentFile, summary_idxs: list[int]) -> dict[str, Tensor]:
    """The trunk by the names of the family's repositories on the hub."""
    state = {"radio_model.summary_idxs": torch.tensor(summary_idxs, dtype=torch.long)}
    for name, value in to_public(file).items():
        if name.startswith("base_model."):
            state[f"{PREFIX}{name.removeprefix('base_model.')}"] = value
        elif name.startswith("input_conditioner."):
            state[f"radio_model.{name}"] = value
    return state
