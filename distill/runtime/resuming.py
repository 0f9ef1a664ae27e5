"""What may differ when a run goes on in its folder, and how the rest is told.

Keys are compared by what they decide. Some decide nothing of the result: logs, worker processes,
memory. Some name things by their places, such as shards and weights: these may move, and their
contents are compared, once they are read, with what the checkpoint was trained on. All others
decide the result. `run.resume=anyway` goes on all the same, and `changes.jsonl` in the run's folder
notes it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from data.files import read_json_lines, write_json_lines
from distill.runtime.errors import RecipeError

CHANGES = "changes.jsonl"

# Whole keys, where * stands for one name, ** for any further ones.
_FREE = (
    *("benchmarks.**", "checkpoint.**", "tracking.**", "evaluation.**"),
    *("run.dir", "run.steps", "run.watchdog_s", "run.ranks_wait_s", "run.resume"),
    *("engine.zero_stage", "targets.placement.**"),  # checkpoints are resharded
    *("data.workers", "data.prefetch", "data.worker_start", "data.index_dir", "data.decoder"),
    *("data.max_bad_share", "data.verify_checksums", "data.allow_pipe"),
    *("**.micro_batch_size", "**.chunk_size", "student.activation_checkpointing"),
)
# Key to what is compared in its place, by its name in `Contents`.
_BY_CONTENT = {
    "data.sources.*.shards.**": "data.sources.{0}",
    "data.lanes": "data.lanes",
    "teachers.*.**": "teachers.{0}",
    "teacher.**": "teacher",
    "targets.cached": "teachers",
    "student.init.**": "",  # the checkpoint has all weights
    "student.weights": "",
}
_EFFECTS = {
    "run.seed": "other random numbers: order, crops and initial weights",
    "run.resolution.**": "other image sizes",
    "run.batch_size": "other images in each step",
    "arms.**": "other images in each step",
    "data.sources.*.weight": "another mixture: the stream differs from the first step",
    "data.sources.*.crops": "other crops and flips",
    "data.sources.**": "other images: the stream differs from the first step",
    "data.augmentation.**": "other crops and flips",
    "data.**": "another stream of images",
    "teachers.**": "other targets",
    "teacher.**": "other targets",
    "targets.**": "other targets",
    "student.**": "another student, which the checkpoint may not fit",
    "upsampler.**": "another upsampler, which the checkpoint may not fit",
    "optimizer.**": "other steps of the optimiser",
    "schedule.**": "other learning rates",
    "engine.**": "other steps of the optimiser",
    "objective.**": "another loss",
    "**": "another run",
}

# Keys that are younger than some runs, whose folders lack them: what such a run has, by its recipe.
_YOUNGER: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "student.head.attention_bias": lambda recipe: bool(
        recipe.get("student", {}).get("head", {}).get("attention_blocks")
    ),
}

Contents = Mapping[str, str]


class Change(NamedTuple):
    """A key that differs between a run's folder and the recipe that goes on in it.

    Attributes:
        key: of the recipe, such as `data.sources.0.shards`.
        old: its value in the folder; None where it is missing.
        new: its value in the recipe.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} there, {self.new!r} here"

    @property
    def effect(self) -> str:
        """What it changes, in words."""
        return next(text for key, text in _EFFECTS.items() if _fits(key, self.key))


def changes(old: Any, new: Any, key: str = "") -> list[Change]:
    """All leaves in which two trees differ; a list of plain values is a leaf."""
    if _section(old) and _section(new) and (old or new):
        old, new = old or {}, new or {}
        keys: Sequence[Any] = [*old, *(k for k in new if k not in old)]
        pairs = [(k, old.get(k), new.get(k)) for k in keys]
    elif _alike(old, new):
        pairs = [(k, *pair) for k, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [Change(key, old, new)]
    return [c for k, a, b in pairs for c in changes(a, b, f"{key}.{k}" if key else str(k))]


def _section(value: Any) -> bool:
    """Whether it is a mapping, or a missing one."""
    return value is None or isinstance(value, dict)


def _alike(old: Any, new: Any) -> bool:
    """Whether both are lists of as many mappings, which are compared one by one."""
    both = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    return both and all(isinstance(each, dict) for each in [*old, *new])


def deciding(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The changes between two recipes that may change the result.

    A key that is younger than the old recipe has the value of `_YOUNGER` there.
    """
    found = [
        each._replace(old=_YOUNGER[each.key](old))
        if each.old is None and each.key in _YOUNGER
        else each
        for each in changes(dict(old), dict(new))
    ]
    decides = [each for each in found if not any(_fits(key, each.key) for key in _FREE)]
    return [each for each in decides if each.old != each.new]


def content_of(change: Change) -> str | None:
    """What decides in the place of a key's text, by its name in `Contents`.

    Returns:
        None for a key that decides itself; an empty name where the checkpoint has all that counts.
    """
    for key, name in _BY_CONTENT.items():
        found = _fits(key, change.key)
        both = change.old is not None and change.new is not None
        if found and (both or key != "targets.cached"):
            return name.format(*found.groups())
    return None


def unlike(found: Sequence[Change], then: Contents, now: Contents) -> list[Change]:
    """The changes of contents.

    Args:
        found: keys that are compared by their contents; those that have only moved are left out.
        then: the contents at the newest checkpoint, empty without one.
        now: those of this run. Contents that changed at their old place count too.
    """
    shared = [key for key in then if key in now]
    other = {key for key in shared if then[key] != now[key]}
    real = []
    for change in found if then else ():
        name = content_of(change)
        about = {key for key in shared if f"{key}.".startswith(f"{name}.")}
        if name and (about & other or not about):
            real.append(change)
            other -= about
    return real + [Change(key, then[key], now[key]) for key in shared if key in other]


def refuse(folder: Path, found: Sequence[Change]) -> NoReturn:
    """Raises RecipeError, which names every change, what it changes, and the ways to go on."""
    effects = "".join(f"\n  {each.key} -> {each.effect}" for each in found)
    own = [f"{c.key}={json.dumps(c.old)}" for c in found if _settable(c)]
    keep = f"keep what that run has by {' '.join(own)}, " if own else ""
    raise RecipeError(
        f"run.dir: {folder} already holds a run of another recipe "
        f"({'; '.join(map(str, found))}):{effects}\nchoose another run.dir, {keep}or go on in "
        f"spite of that by run.resume=anyway, which is noted in {folder / CHANGES}"
    )


def _settable(change: Change) -> bool:
    """Whether the value in the folder can be given again as `key=value`."""
    plain = isinstance(change.old, bool | int | float) and content_of(change) is None
    return plain and not any(part.isdigit() for part in change.key.split("."))


def note(folder: Path, step: int, found: Sequence[Change]) -> None:
    """Adds changes at a step to the folder's `changes.jsonl`."""
    rows = [{"step": step, "key": c.key, "old": c.old, "new": c.new} for c in found]
    plain = json.loads(json.dumps(rows, default=str))
    write_json_lines(folder / CHANGES, [*read_json_lines(folder / CHANGES), *plain])


def _fits(pattern: str, key: str) -> re.Match[str] | None:
    if pattern == "**":
        return re.fullmatch(".*", key)
    text = re.escape(pattern).replace(r"\.\*\*", r"(?:\..*)?").replace(r"\*\*\.", r"(?:.*\.)?")
    return re.fullmatch(text.replace(r"\*", r"([^.]+)"), key)
