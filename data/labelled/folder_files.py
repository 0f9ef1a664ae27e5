"""Lists the files of a folder by their names, to be paired with files of the same names."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from data.errors import DataError
from data.image_files import is_hidden
from data.labelled.files import naming
from data.text import shown


def files_by_name(
    folder: Path, extensions: Collection[str], only: Collection[str] | None = None
) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder with some extensions, in any case, by name without extension, sorted.

    Returns:
        The files, and the names of all others, also of folders that hold such files, with a slash.

    Raises:
        DataError: two files have the same name without extension; names both. A link leads nowhere.
    """
    chosen = None if only is None else set(only)
    found: dict[str, Path] = {}
    left_out = []
    with naming(folder, "folder"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        stem, _, extension = entry.name.rpartition(".")
        if is_hidden(entry.name):
            left_out.append(entry.name)
            continue
        if entry.is_dir():
            left_out += [f"{entry.name}/"] if _holds(entry.path, extensions) else []
            continue
        if extension.lower() not in extensions:
            left_out.append(entry.name)
            continue
        if chosen is not None and stem not in chosen:
            continue
        if not entry.is_file():
            raise DataError(f"'{shown(entry.path)}' is a broken link or special file")
        if stem in found:
            raise DataError(
                f"'{shown(folder)}' has both '{shown(found[stem].name)}' and "
                f"'{shown(entry.name)}', which belong to one name; remove one of them"
            )
        found[stem] = folder / entry.name
    return found, left_out


def _holds(folder: str, extensions: Collection[str]) -> bool:
    with os.scandir(folder) as entries:
        return any(each.name.rpartition(".")[2].lower() in extensions for each in entries)


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Raises an error for a list that names an image of a folder twice, which would count twice."""
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(
            f"the list of the images in {where} has '{shown(repeated[0])}' more than once "
            f"({len(repeated)} names are repeated)"
        )


def beside(name: str, left_out: Sequence[str]) -> str:
    """The hint where the file exists with another extension."""
    similar = [each for each in left_out if each.rpartition(".")[0] == name]
    return f" (there is {shown(similar[0])}, which is not read)" if similar else ""
