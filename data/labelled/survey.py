"""Surveys: what a data set holds, counted and judged before any model reads it.

A survey lists the files of all splits, counts their labels once, and judges the counts: an error is
what makes a figure meaningless, a warning what is merely suspicious. Counts are plain JSON, so that
they can be kept and judged again.
"""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from data.errors import DataError, similar_path
from data.labelled.layout import Split, is_there
from data.text import shown

Size = tuple[int, int]  # (height, width) in pixels
# Judges the sizes of the images of each split, by what a benchmark does with them.
Fits = Callable[[Mapping[str, Sequence[Size]]], list["Finding"]]

SPLITS: tuple[str, ...] = get_args(Split)
SHOWN = 5  # names of a list in a message
_LONGEST = 60  # characters of such a name


class Finding(NamedTuple):
    """Something wrong with a data set.

    Attributes:
        text: what is wrong, with names and counts.
        fatal: whether figures would be meaningless.
        hint: the likely cause or the cure; several findings may share it.
        note: whether it is a fact and no warning.
        final: whether there would be no figure at all, so that a recipe cannot accept it.
    """

    text: str
    fatal: bool = False
    hint: str = ""
    final: bool = False
    note: bool = False


def told(findings: Iterable[Finding]) -> list[str]:
    """The texts of findings, each hint behind the first that has it."""
    lines, said = [], {""}
    for finding in findings:
        lines.append(finding.text if finding.hint in said else f"{finding.text}; {finding.hint}")
        said.add(finding.hint)
    return lines


class Survey(ABC):
    """What a benchmark reads.

    Attributes:
        root: the folder that names of files are relative to.
        tree: the expected files below it, for messages.
        noun: what is counted, for messages.
        may_be_empty: whether files without content are no error.
        options: what the counts depend on beside the files.
    """

    root: Path
    tree: str
    noun: str = "labels"
    may_be_empty: bool = False
    options: str = ""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that is read, of all splits.

        Raises:
            DataError: a folder or a list is missing; the message shows the expected tree.
        """

    def count(self) -> dict[str, Any]:
        """Reads the labels of all splits, and the first image of each; without labels, nothing.

        Returns:
            Counts as JSON.

        Raises:
            DataError: a file cannot be read, or does not fit its image.
        """
        return {"files": len(self.files())}

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """What is wrong with what `count` returned."""
        return []

    def parsed(self) -> str:
        """What identifies annotations that are not in `files`; part of the digest."""
        return ""


class FilesSurvey(Survey):
    """Lists files and folders of which nothing else is known.

    Args:
        paths: of both, that exist; folders however deep.
    """

    noun = "files"
    tree = "  files"
    may_be_empty = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self.root = Path(os.path.commonpath([path.absolute() for path in paths]))
        found = [each for path in paths for each in (path.rglob("*") if path.is_dir() else [path])]
        self._files = sorted({path.absolute() for path in found if path.is_file()})

    def files(self) -> list[Path]:
        """See `Survey.files`."""
        return self._files


def below(root: Path, path: Path | None) -> str | None:
    """The name of a file below the root, which is the same wherever a data set lies."""
    return None if path is None else os.path.relpath(path, root)


def samples_of(dataset: Any) -> dict[str, list[Any]]:
    """The samples of both splits of a layout.

    Raises:
        DataError: files are missing, or a split has no image or has one twice.
    """
    found: dict[str, list[Any]] = {split: dataset.samples(split) for split in SPLITS}
    for split, samples in found.items():
        if not samples:
            raise DataError(
                f"{split} lists no image; expected under {dataset.root}:\n{dataset.tree}"
            )
        times = Counter(getattr(sample, "image", sample) for sample in samples)
        if twice := [image for image, number in times.items() if number > 1]:
            raise DataError(
                f"{split} lists {shown(twice[0])} more than once ({len(twice)} images are "
                f"repeated, and would count several times)"
            )
    return found


def require_files(survey: Survey, files: Iterable[Path]) -> None:
    """Checks that files exist.

    Raises:
        DataError: names the first that is missing, how many are, and the expected tree.
    """
    missing = [path for path in files if not is_there(path)]
    if missing:
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise DataError(
            f"there is no {shown(missing[0])}{similar_path(missing[0])}{more}; expected under "
            f"{survey.root}:\n{survey.tree}"
        )


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown(name, _LONGEST) for name in names[:SHOWN]) + more


def per_cent(part: float, whole: float) -> str:
    """A share for messages: `12 %`, `0.03 %`."""
    return f"{100 * part / max(whole, 1e-30):.3g} %"


def any_sizes(sizes: Mapping[str, Sequence[Size]]) -> list[Finding]:
    """Nothing is wrong with images of any sizes."""
    return []


def sizes_of(counts: Mapping[str, Any]) -> dict[str, list[Size]]:
    """The sizes of the images of each split, of counts that were read from JSON."""
    return {split: [(size[0], size[1]) for size in counts[split]["sizes"]] for split in SPLITS}


def one_size(sizes: Sequence[Size], cure: str) -> list[Finding]:
    """An error where the training images of a batch would have several sizes."""
    found = sorted(set(sizes))
    if len(found) < 2:
        return []
    shown = listed([f"{height} x {width}" for height, width in found])
    text = f"training images have {len(found)} sizes ({shown} px), and a batch needs one"
    return [Finding(f"{text}; set {cure}", fatal=True, final=True)]


def same_images(splits: Mapping[str, Sequence[Path]]) -> list[Finding]:
    """A warning where images are both trained and tested on."""
    both = sorted(set(splits["train"]) & set(splits["test"]))
    if not both:
        return []
    return [
        Finding(
            f"{len(both)} of {len(set(splits['test']))} test images are training images too, the "
            f"first is {shown(both[0])}: their figures say nothing of other images"
        )
    ]
