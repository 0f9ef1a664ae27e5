"""The statistics of a student that a run starts from: its map heads speak in them.

PHI-S standardises by a rotation that is estimated, and no two estimates have the same axes. A head
that is taken over is right only in those that it was trained in, so they are taken over with it.
"""

import logging
from collections.abc import Mapping
from typing import Any

from distill.recipe import StudentRecipe
from distill.runtime.config import load_yaml
from distill.targets.target_statistics import IN_CHECKPOINT, TargetStatistics, load_statistics
from student.config import StudentInit
from student.storage import read_header

log = logging.getLogger(__name__)

_AS_SEEN = ("upsampler", "resolution", "chunk_size")  # do not make another encoder of a teacher


def inherited_statistics(recipe: StudentRecipe) -> dict[str, TargetStatistics]:
    """Of the teachers whose heads `student.init` may hand over, by name.

    A teacher of that name that is another encoder, and one whose statistics do not lie beside the
    student's file as a checkpoint has them, are left out, with a warning.
    """
    init = recipe.student.init
    if not isinstance(init, StudentInit) or not init.heads:
        return {}
    if recipe.objective.standardisation == "none":
        return {}
    folder = init.path.parent
    stored = load_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    found = {}
    for name in [name for name in read_header(init.path).targets if name in recipe.teachers]:
        path = folder / "statistics" / f"{name}.safetensors"
        statistics = load_statistics(path, IN_CHECKPOINT)
        ours = recipe.teachers[name].model_dump(mode="json")
        if statistics is None:
            log.warning(
                "student.init: the head of %s is taken over, but %s, which it was trained in, is "
                "not there: its map starts on other axes. Give the student.safetensors of a "
                "checkpoint",
                *(name, path),
            )
        elif _encoder(stored.get("teachers", {}).get(name, {})) != _encoder(ours):
            log.warning("student.init: %s is another encoder there; its head starts anew", name)
        else:
            found[name] = statistics
    return found


def _encoder(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _AS_SEEN}
