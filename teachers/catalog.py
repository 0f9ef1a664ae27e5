"""Lists the known encoders and their licences: `python -m teachers.catalog [WORD ...]`.

A recipe may name any teacher by its kind and model, listed or not.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from teachers.catalog_rows import OPEN_KINDS, ROWS, OpenKind, Row
from teachers.errors import TeacherError
from teachers.licences import LICENCES, NO_LICENCE, licence_text
from teachers.messages import did_you_mean
from teachers.radio_hub import repository
from teachers.teacher import TeacherConfig

_CAPTION = (
    "D: channels of the map. px: side of the native image.\n"
    "sizes: any, all multiples of the patch (a CNN: any at all); asked, the same if the entry has "
    "`resolution: [H, W]`; one, only the size that `resolution` sets.\n"
    "pixels: mean and std of the normalisation. map: where it is taken. M: millions of "
    "parameters.\n"
    "The licence that comes with the weights decides, not this table."
)
_SHORT = {
    "last block, ": "",
    "after the final norm": "normed",
    "without a final norm": "no norm",
    "before the projection": "unprojected",
    "before the neck": "pre-neck",
}
_WIDTH = 300  # columns of a table in a file, so that no line is wrapped


def licence_of(config: TeacherConfig) -> str:
    """The licence of a teacher's weights, and how it may limit the use of a student, in one line.

    For unknown weights it says where to read the licence. A user's own config overrides `licence`.

    Raises:
        TeacherError: a user's own config gives something else than a text.
    """
    given: object = config.licence
    own = given() if callable(given) else given  # a user's config may have a field of that name
    if own is not None:
        if not isinstance(own, str):
            raise TeacherError(
                f"{type(config).__name__}.licence: expected a text, or a method that returns one, "
                f"got {own!r}"
            )
        return own
    entry = config.model_dump()
    model, weights = entry.get("model"), entry.get("weights")
    if weights == "none":
        return NO_LICENCE
    of_model = {row.weights: str(LICENCES[row.licence]) for row in ROWS if row.model == model}
    if weights in of_model:
        return of_model[weights]
    if len(set(of_model.values())) == 1 and Path(str(weights)).exists():
        return f"{of_model.popitem()[1]}; assuming that {weights} holds the published weights"
    return _licence_elsewhere(config.kind, model, weights)


def _licence_elsewhere(kind: str, model: str | None, weights: str | None) -> str:
    """The licence of weights without a row: from timm's table, or where to read it."""
    if kind == "timm" and weights is None:
        found = _timm_licence(str(model))
        if found is not None:
            return found
    if kind in ("dfn_clip", "siglip", "open_clip"):
        import open_clip

        tag = open_clip.get_pretrained_cfg(str(model), str(weights)) or {}
        repository = tag.get("hf_hub", "").rpartition("/")[0]
        if repository:
            found = _timm_licence(repository.removeprefix("timm/"))
            return found or licence_text(None, f"at https://huggingface.co/{repository}")
    if kind == "hf" and not Path(str(model)).is_dir():
        return licence_text(None, f"at https://huggingface.co/{model}")
    return licence_text(None, f"where {weights or model or 'the weights'} came from")


def _timm_licence(model: str) -> str | None:
    """The licence that timm states for a model with its tag; None for an unknown model."""
    import timm

    published = timm.get_pretrained_cfg(model) if timm.is_model_pretrained(model) else None
    if published is None:
        return None
    # timm's default is Apache-2.0, which is wrong for PaliGemma's towers: Gemma's licence.
    licence = "gemma" if str(published.tag).startswith("pali") else published.license
    return licence_text(licence, f"at https://huggingface.co/{published.hf_hub_id}")


def find_rows(words: Sequence[str]) -> tuple[list[Row], list[OpenKind]]:
    """The entries whose name, kind, model or licence contain every word, in any case."""

    def has(*texts: str | None) -> bool:
        text = " ".join(filter(None, texts)).lower()
        return all(word.lower() in text for word in words)

    rows = [
        row
        for row in ROWS
        if has(row.name, row.kind, row.model, row.weights, LICENCES[row.licence].name)
        or (row.kind == "radio" and has(repository(row.model)))
    ]
    return rows, [kind for kind in OPEN_KINDS if has(kind.name, kind.kind)]


def catalog_table(rows: Sequence[Row], open_kinds: Sequence[OpenKind]) -> Table:
    """The encoders as a table for the terminal."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("teacher", "kind", "model", "further keys"):
        table.add_column(name, overflow="fold")
    for name in ("D", "summary", "patch", "px", "sizes", "pixels", "map", "M"):
        table.add_column(name, justify="right" if name in ("D", "summary", "px", "M") else "left")
    for name in ("licence", "limits a student"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    for kind in open_kinds:
        note = f"not here: needs {kind.library}" if find_spec(kind.library) is None else ""
        table.add_row(kind.name, kind.kind, kind.model, kind.keys, *[""] * 8, "by its model", note)
    return table


def _cells(row: Row) -> list[str]:
    keys = row.entry | ({"weights": _local(row)} if row.kind == "radio" else {})
    place = row.place
    for words, short in _SHORT.items():
        place = place.replace(words, short)
    return [
        row.name,
        keys.pop("kind"),
        keys.pop("model"),
        ", ".join(f"{key}: {value}" for key, value in keys.items()),
        str(row.width),
        "none" if row.summary is None else str(row.summary),
        str(row.patch),
        str(row.side),
        row.sizes,
        row.pixels,
        place,
        f"{row.millions:.1f}",
        row.licence,
        LICENCES[row.licence].limits,
    ]


def _local(row: Row) -> str:
    """What a recipe names as the weights of a model that is not downloaded."""
    return f"FILE, or folder of {repository(row.model)}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m teachers.catalog",
        description="List the known encoders, their shapes, and the licence of their weights.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="show only those whose name, kind, model or licence contains every word",
    )
    words = parser.parse_args(arguments).words
    rows, open_kinds = find_rows(words)
    if not rows and not open_kinds:
        names = [word for row in ROWS for word in row.name.split()]
        parser.error(
            f"no encoder matches {' '.join(words)!r}{did_you_mean(words[-1], names)}; "
            "without words every encoder is shown"
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(catalog_table(rows, open_kinds))
    console.print(_CAPTION)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
