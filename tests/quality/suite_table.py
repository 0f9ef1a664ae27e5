"""The table of `tests.quality.suite`: figures over seeds, Delta_m, and what a model costs."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from distill.evaluation.models import parse_model
from distill.evaluation.relative_change import Change, relative_changes
from teachers.build import build_teacher
from tests.quality.suite_rows import COLUMNS, Entry, encoder_of, teachers

BEST = "the best single teacher"
Rows = list[dict[str, Any]]


def figures(results: Rows, name: str, column: str) -> tuple[list[float], bool]:
    """The figures of a row in a column, one for each seed, and whether lower is better."""
    metric = COLUMNS[column].metric if column in COLUMNS else None
    own = [row for row in results if row["benchmark"] == column and row["model"] == name]
    keys = [metric or next(iter(row["figures"])) for row in own]
    values = [row["figures"][key] for row, key in zip(own, keys, strict=True)]
    return values, any(key in row["lower_is_better"] for row, key in zip(own, keys, strict=True))


def shared_summaries(results: Rows, rows: Mapping[str, Entry], data: Path) -> Rows:
    """The results, with an encoder's kNN for those of its upsampled rows that were asked for."""
    copied = [
        row | {"model": name}
        for name in rows
        for row in results
        if encoder_of(name, data) == row["model"] != name
        and row["benchmark"] in COLUMNS
        and not COLUMNS[row["benchmark"]].of_map
    ]
    return [*results, *copied]


def best_teacher(results: Rows, column: str, data: Path) -> str | None:
    """The best single teacher of a column, of those that were measured; None if none was."""
    of = {each: figures(results, each, column) for each in teachers(data)}
    known = {each: mean(values) for each, (values, _) in of.items() if values}
    lower = any(is_error for _, is_error in of.values())
    return (min if lower else max)(known, key=lambda each: known[each], default=None)


def changes(results: Rows, name: str, columns: Sequence[str], data: Path) -> Change | None:
    """Delta_m of a row over those columns that it and some single teacher have."""
    best: Rows = []
    groups: dict[str, list[str]] = {}
    for column in columns:
        metric = COLUMNS[column].metric
        winner = best_teacher(results, column, data)
        if winner is None or not figures(results, name, column)[0]:
            continue
        best += [
            row | {"model": BEST}
            for row in results
            if row["model"] == winner and row["benchmark"] == column
        ]
        groups[column] = [column if metric is None else f"{column}.{metric}"]
    if not groups:
        return None
    own = [row for row in results if row["model"] == name and row["benchmark"] in groups]
    return relative_changes([*best, *own], BEST, groups).models[name].total


def cost(entry: Entry) -> dict[str, Any]:
    """Size of a model, its image and its map, and the time of an image, alone, in this process."""
    encoder = build_teacher(parse_model(entry))
    image, times = torch.rand(1, 3, *encoder.spec.resolution), []
    for _ in range(4):
        start = time.perf_counter()
        encoder(image)
        times.append(time.perf_counter() - start)
    parameters = sum(each.numel() for each in encoder.parameters())
    grid = encoder.spec.grid(*encoder.spec.resolution)
    return {
        "millions": round(parameters / 1e6, 1),
        "image": list(encoder.spec.resolution),
        "grid": list(grid),
        "ms": round(1000 * median(times[1:]), 1),
    }


def costs(rows: Mapping[str, Entry], file: Path) -> dict[str, dict[str, Any]]:
    """The costs of all rows; those in the file are kept."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    for name, entry in rows.items():
        if known.get(name, {}).get("entry") != entry:
            known[name] = {"entry": entry} | cost(entry)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known, indent=1))
    return {name: known[name] for name in rows}


def summarised(
    results: Rows,
    rows: Mapping[str, Entry],
    chosen: Sequence[str],
    data: Path,
    known_costs: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Each row's figures: name, cost, for each column the mean, deviation and seeds, Delta_m."""
    lines = []
    for name in rows:
        line: dict[str, Any] = {"model": name, "cost": known_costs[name], "figures": {}}
        for column in chosen:
            values, lower = figures(results, name, column)
            if values:
                line["figures"][column] = {
                    "mean": mean(values),
                    "deviation": stdev(values) if len(values) > 1 else None,
                    "seeds": len(values),
                    "lower_is_better": lower,
                }
        change = changes(results, name, [each for each in chosen if each in COLUMNS], data)
        line["delta_m"] = None if change is None else change._asdict()
        lines.append(line)
    return lines


def markdown(lines: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> str:
    """The table, the best of each column in bold."""
    titles = [COLUMNS[each].title if each in COLUMNS else f"{each}, %" for each in chosen]
    head = ["", "M", "px", "cells", "ms an image", *titles, "Delta_m %"]
    table = [head, ["---", *["---:"] * (len(head) - 1)]]
    best = {column: _best(lines, column) for column in chosen}
    top = max((each["delta_m"]["mean"] for each in lines if each["delta_m"]), default=None)
    for line in lines:
        price = line["cost"]
        cells = [line["model"], f"{price['millions']:g}", _size(price["image"])]
        cells += [_size(price["grid"]), f"{price['ms']:g}"]
        for column in chosen:
            found = line["figures"].get(column)
            text = "–" if found is None else _spread(found["mean"], found["deviation"], column)
            cells.append(f"**{text}**" if found and found["mean"] == best[column] else text)
        change = line["delta_m"]
        text = "–" if change is None else _spread(change["mean"], change["spread"], "", "+")
        cells.append(f"**{text}**" if change and change["mean"] == top else text)
        table.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _best(lines: Sequence[Mapping[str, Any]], column: str) -> float | None:
    found = [line["figures"][column] for line in lines if column in line["figures"]]
    choose = min if found and found[0]["lower_is_better"] else max
    return choose((each["mean"] for each in found), default=None)


def _spread(value: float, deviation: float | None, column: str, sign: str = "") -> str:
    digits = 3 if column == "depth" else 1
    text = f"{value:{sign}.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
