"""A comparison of upsamplers as a table: means over seeds, their spread, the best in bold."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rich.table import Table

_FIDELITIES = ("own", "box", "true")


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The lines of `fidelity.jsonl` for a screen, a method a line.

    Args:
        rows: see `comparison.compare`; the best is sought among those of one factor.
    """
    table = Table(
        *("factor", "method", "seeds", "images seen"),
        title="Fidelity to the encoder on held-out images (mean ± standard deviation of the seeds)",
    )
    for name in ("own", "box", "true", "seam ratio"):
        table.add_column(name, justify="right")
    factors = list(dict.fromkeys(tuple(row["factor"]) for row in rows))
    for factor in factors:
        of_factor = [row for row in rows if tuple(row["factor"]) == factor]
        methods: dict[str, list[Mapping[str, Any]]] = {}
        for row in of_factor:
            methods.setdefault(row["method"], []).append(row)
        best = {key: max(_means(methods, key), default=None) for key in _FIDELITIES}
        for number, (name, seeds) in enumerate(methods.items(), 1):
            table.add_row(
                f"{factor[0]} x {factor[1]}",
                name,
                str(len(seeds)),
                _images_seen(seeds),
                *(_figure(seeds, key, best.get(key)) for key in (*_FIDELITIES, "seam_ratio")),
                end_section=number == len(methods),
            )
    return table


def _means(methods: Mapping[str, list[Mapping[str, Any]]], key: str) -> list[float]:
    return [mean(s[key] for s in seeds) for seeds in methods.values() if seeds[0][key] is not None]


def _figure(seeds: list[Mapping[str, Any]], key: str, best: float | None) -> str:
    figures = [seed[key] for seed in seeds]
    if None in figures:
        return "-"
    middle = mean(figures)
    text = f"{middle:.3f}" + (f" ± {stdev(figures):.3f}" if len(figures) > 1 else "")
    return f"[bold]{text}[/bold]" if middle == best else text


def _images_seen(seeds: list[Mapping[str, Any]]) -> str:
    seen = sorted({str(seed["training"]["images_seen"] or "-") for seed in seeds})
    return ", ".join(seen)
