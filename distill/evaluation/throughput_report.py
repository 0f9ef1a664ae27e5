"""Times by resolution as a table and as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

_TITLES = {"linear": "linear encoder"}

Rows = Sequence[Mapping[str, Any]]


def throughput_table(rows: Rows, crossings: Rows) -> Table:
    """A line for each teacher and method, a column for each factor, and the break-even factor.

    Args:
        rows: the lines of `throughput.jsonl`.
        crossings: the lines of `break_even.jsonl`.
    """
    factors = sorted({tuple(row["factor"]) for row in rows}, key=lambda f: (math.prod(f), f))
    table = Table(title="Milliseconds an image (microseconds a token)")
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
            teacher,
            _TITLES.get(method, method),
            *(_figure(at[f]) if f in at else "-" for f in factors),
            _from(_crossing(crossings, teacher, method)),
            end_section=last,
        )
    return table


def draw_throughput(path: Path, rows: Rows, crossings: Rows) -> None:
    """Draws a row a teacher: time an image and time a token against resolution, both axes in logs.

    Where an upsampler becomes faster than its encoder is a dotted line in its colour.

    Args:
        path: the PNG to write.
        rows: the lines of `throughput.jsonl`.
        crossings: the lines of `break_even.jsonl`.
    """
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(teachers)), layout="constrained")
    axes = figure.subplots(len(teachers), 2, squeeze=False)
    for pair, teacher in zip(axes, teachers, strict=True):
        own = {m: points for (t, m), points in _curves(rows).items() if t == teacher}
        native = _side(own["encoder"][0])
        for axis, key, scale, unit in (
            (pair[0], "seconds_per_image", 1e3, "ms an image"),
            (pair[1], "seconds_per_token", 1e6, "µs a token"),
        ):
            for method, points in own.items():
                points = sorted(points, key=_side)
                sides = [_side(row) for row in points]
                style = {"encoder": "ko-", "linear": "k:"}.get(method, "o-")
                label = _TITLES.get(method, method)
                crossing = _crossing(crossings, teacher, method)
                if crossing is not None:
                    label += f" (break-even: {_from(crossing)})"
                (line,) = axis.plot(sides, [scale * r[key] for r in points], style, label=label)
                if crossing is not None and (crossing["factor"] or 0) > 1:
                    at = native * crossing["factor"]
                    axis.axvline(at, color=line.get_color(), linestyle=":", linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel="resolution, px", ylabel=unit)
            axis.set_title(teacher)
            ticks = sorted({_side(row) for row in rows if row["teacher"] == teacher})
            axis.set_xticks(ticks, [f"{side:.0f}" for side in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        pair[0].legend(fontsize="small")
    first = rows[0]
    figure.suptitle(
        f"{first['device']}, {first['precision']}, batches of {first['batch_size']}, "
        f"medians of {first['rounds']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _curves(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The rows by teacher and method."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["teacher"], row["method"]), []).append(row)
    return curves


def _side(row: Mapping[str, Any]) -> float:
    """Pixels of a side; of a square of the same area, where the image is none."""
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
