"""Shows the times by resolution as a table and as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from distill.display.text import chart_text, table_text

_TITLES = {"linear": "linear encoder"}

Rows = Sequence[Mapping[str, Any]]


def throughput_table(rows: Rows, crossings: Rows) -> RichTable:
    """A table of methods by factors, from rows of `throughput.jsonl` and `break_even.jsonl`."""
    factors = sorted({tuple(row["factor"]) for row in rows}, key=lambda f: (math.prod(f), f))
    table = RichTable(title="Milliseconds per image (microseconds per token)")
    for name in ("teacher", "method"):
        table.add_column(name, no_wrap=True)
    for fh, fw in factors:
        table.add_column(f"{fh} x {fw}", justify="right")
    table.add_column("break-even", justify="right", no_wrap=True)
    curves = _curves(rows)
    for number, ((teacher, method), points) in enumerate(curves.items()):
        at = {tuple(row["factor"]): row for row in points}
        last = number + 1 == len(curves) or list(curves)[number + 1][0] != teacher
        table.add_row(
            table_text(teacher),
            table_text(_TITLES.get(method, method)),
            *(_figure(at[f]) if f in at else "-" for f in factors),
            _from(_crossing(crossings, teacher, method)),
            end_section=last,
        )
    return table


def draw_throughput(path: Path, rows: Rows, crossings: Rows) -> None:
    """Draws a PNG: the time of an image and of a token against resolution, on logarithmic axes.

    Each teacher has a row. A dotted line marks the resolution from which an upsampler is faster
    than its encoder.
    """
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(teachers)), layout="constrained")
    axes = figure.subplots(len(teachers), 2, squeeze=False)
    for (of_image, of_token), teacher in zip(axes, teachers, strict=True):
        own = [row for row in rows if row["teacher"] == teacher]
        _draw_curves(of_image, own, crossings, "seconds_per_image", 1e3)
        _draw_curves(of_token, own, crossings, "seconds_per_token", 1e6)
        of_image.set_ylabel("ms per image")
        of_token.set_ylabel("µs per token")
        of_image.legend(fontsize="small")
    first = rows[0]
    figure.suptitle(
        f"{first['device']}, {first['precision']}, batches of {first['batch_size']}, "
        f"medians of {first['rounds']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_curves(axis: Any, rows: Rows, crossings: Rows, key: str, scale: float) -> None:
    """Draws the curves of one teacher, a line for each method."""
    teacher = rows[0]["teacher"]
    native = next(_side(row) for row in rows if row["method"] == "encoder")
    for (_, method), points in _curves(rows).items():
        points = sorted(points, key=_side)
        style = {"encoder": "ko-", "linear": "k:"}.get(method, "o-")
        label = chart_text(_TITLES.get(method, method))
        crossing = _crossing(crossings, teacher, method)
        if crossing is not None:
            label += f" (break-even: {_from(crossing)})"
        sides, times = zip(*((_side(row), scale * row[key]) for row in points), strict=True)
        (line,) = axis.plot(sides, times, style, label=label)
        if crossing is not None and (crossing["factor"] or 0) > 1:
            at = native * crossing["factor"]
            axis.axvline(at, color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="resolution, px", title=chart_text(teacher))
    ticks = sorted({_side(row) for row in rows})
    axis.set_xticks(ticks, [f"{side:.0f}" for side in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _curves(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The rows by teacher and method."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["teacher"], row["method"]), []).append(row)
    return curves


def _side(row: Mapping[str, Any]) -> float:
    """Side of the square with the same area, in pixels."""
    return math.sqrt(math.prod(row["resolution"]))


def _crossing(crossings: Rows, teacher: str, method: str) -> Mapping[str, Any] | None:
    found = [c for c in crossings if (c["teacher"], c["method"]) == (teacher, method)]
    return found[0] if found else None


def _figure(row: Mapping[str, Any]) -> str:
    return f"{1e3 * row['seconds_per_image']:.1f} ({1e6 * row['seconds_per_token']:.0f})"


def _from(crossing: Mapping[str, Any] | None) -> str:
    if crossing is None:
        return "-"
    factor = crossing["factor"]
    return "never" if factor is None else "always" if factor < 1.005 else f"{factor:.2f}x"
