"""The encoders that can teach: `python -m teachers.catalog [WORD ...]` prints them.

A recipe names a teacher by its kind and model, listed here or not; the table only tells what each
is, and under which licence its weights come.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from teachers.catalog_rows import OPEN_KINDS, ROWS, OpenKind, Row
from teachers.licences import LICENCES, licence_text
from teachers.messages import did_you_mean
from teachers.teacher import TeacherConfig

_CAPTION = (
    "D: channels of the map. px: side of the native image.\n"
    "sizes: any, multiples of the patch; asked, the same once the entry has `resolution: [H, W]`; "
    "one, the one that it asks for so.\n"
    "pixels: whose mean and std. map: where it is taken. M: millions of parameters built.\n"
    "The licence that comes with the weights decides, not this table."
)
_SHORT = {
    "last block, ": "",
    "after the final norm": "normed",
    "without a final norm": "no norm",
    "before the projection": "unprojected",
    "before the neck": "pre-neck",
}
_WIDTH = 300  # of a table that goes to a file: no line is broken


def licence_of(config: TeacherConfig) -> str:
    """The licence of a teacher's weights in words, and how it may limit a student's use.

    Args:
        config: of the teacher, as a recipe has it; a class of a user's own overrides its
            `licence`.

    Returns:
        One line; for weights that we do not know, where to read it.
    """
    own = config.licence()
    if own is not None:
        return own
    entry = config.model_dump()
    model, weights = entry.get("model"), entry.get("weights")
    if weights == "none":
        return "random weights, no licence"
    of_model = {row.weights: str(LICENCES[row.licence]) for row in ROWS if row.model == model}
    if weights in of_model:
        return of_model[weights]
    if len(set(of_model.values())) == 1 and Path(str(weights)).exists():
        return f"{of_model.popitem()[1]}; {weights} is taken for the published weights"
    return _licence_elsewhere(config.kind, model, weights)


def _licence_elsewhere(kind: str, model: str | None, weights: str | None) -> str:
    """The licence of weights that are no row's: timm knows many, and where the others lie."""
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
    """What timm states of a model by its name and tag; None where it knows no such."""
    import timm

    published = timm.get_pretrained_cfg(model) if timm.is_model_pretrained(model) else None
    if published is None:
        return None
    # It says Apache-2.0 of what it was told nothing about: PaliGemma's towers are under Gemma's.
    licence = "gemma" if str(published.tag).startswith("pali") else published.license
    return licence_text(licence, f"at https://huggingface.co/{published.hf_hub_id}")


def find_rows(words: Sequence[str]) -> tuple[list[Row], list[OpenKind]]:
    """What the words, all of them, occur in: names, kinds, models or licences, in any case."""

    def has(*texts: str | None) -> bool:
        text = " ".join(filter(None, texts)).lower()
        return all(word.lower() in text for word in words)

    rows = [r for r in ROWS if has(r.name, r.kind, r.model, r.weights, LICENCES[r.licence].name)]
    return rows, [kind for kind in OPEN_KINDS if has(kind.name, kind.kind)]


def catalog_table(rows: Sequence[Row], open_kinds: Sequence[OpenKind]) -> Table:
    """The encoders for a screen."""
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
    keys = row.entry | ({"weights": "FILE"} if row.kind == "radio" else {})
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


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m teachers.catalog",
        description="List the encoders that can teach, what each is, and its weights' licence.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="show only those whose name, kind, model or licence has every word",
    )
    words = parser.parse_args(arguments).words
    rows, open_kinds = find_rows(words)
    if not rows and not open_kinds:
        names = [word for row in ROWS for word in row.name.split()]
        parser.error(
            f"nothing is called {' '.join(words)!r}{did_you_mean(words[-1], names)}; without words "
            "every encoder is shown"
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(catalog_table(rows, open_kinds))
    console.print(_CAPTION)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
