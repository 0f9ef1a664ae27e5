"""Depth in another unit than the one stated."""

from collections.abc import Sequence
from typing import Any

from data.labelled.survey import Finding, per_cent

# Metres of one step, and whether it is of integers only.
UNITS = {
    "metres": (1.0, False),
    "centimetres": (0.01, False),
    "millimetres": (0.001, False),
    "1/256 m, as KITTI": (1 / 256, True),
    "1/5000 m, as TUM": (1 / 5000, True),
    "10 m / 255, as 8 bit": (10 / 255, True),
}
LEAST_INSIDE = 0.5  # share of the known depths inside the range, below which figures are refused
MOST_INSIDE = 0.95  # and below which a warning says so
TINY, SMALL = 1 / 50, 1 / 20  # of the range's end: where the known depths end in a wrong unit
_FITS = (1 / 3, 1.05)  # of the range's end: where they end in the right unit
METRES = (0.05, 200.0)  # where the median depth of a set in metres lies
APART = 20.0  # times that the medians of the splits may differ


def judge_depth(
    counts: dict[str, dict[str, Any]],
    depth_range: tuple[float, float],
    unit: float | None,
    stated: bool,
) -> list[Finding]:
    """Judges the known depths of the splits against the range that is counted.

    Args:
        counts: split to `known`, `inside`, `below`, `above` in pixels, `quantiles` (1, 50 and 99 %
            in metres) and `stored`, the type of the first file.
        depth_range: in metres.
        unit: metres of one stored step; None where the layout decides it.
        stated: whether the recipe states the unit.
    """
    empty = [split for split, each in counts.items() if not each["known"]]
    if empty:
        return [
            Finding(
                f"no pixel of {split} has a known depth: all are 0, negative or not finite",
                fatal=True,
                final=True,
            )
            for split in empty
        ]
    findings = []
    for split, each in counts.items():
        findings += _judge_split(split, each, depth_range, unit, stated)
    medians = [each["quantiles"][1] for each in counts.values()]
    if not any(each.fatal for each in findings) and max(medians) > APART * min(medians):
        shown = " and ".join(f"{m:.3g} m in {s}" for s, m in zip(counts, medians, strict=True))
        findings.append(Finding(f"the median depth is {shown}: are the splits in one unit?", True))
    return findings


def _judge_split(
    split: str,
    counts: dict[str, Any],
    depth_range: tuple[float, float],
    unit: float | None,
    stated: bool,
) -> list[Finding]:
    low, high = depth_range
    first, _, last = counts["quantiles"]
    inside = counts["inside"] / counts["known"]
    fitting = [] if unit is None else _fitting(counts, depth_range, unit)
    seen = f"the known depths of {split} are {first:.3g} to {last:.3g} m (1 to 99 %)"
    cure = _cure(fitting, unit, beyond=last > high)
    if inside < LEAST_INSIDE or last < TINY * high:
        text = f"{seen}, {per_cent(inside, 1)} of them in depth_range [{low:g}, {high:g}]"
        return [Finding(text, True, cure)]
    few_steps = counts["stored"] == "uint8" and unit is not None and 255 * unit < SMALL * high
    if few_steps:
        text = f"{seen}, and its 8 bits reach {255 * (unit or 0):.3g} m of {high:g} m only"
        return [Finding(text, True, cure)]
    findings = []
    if inside < 1:
        text = (
            f"{per_cent(1 - inside, 1)} of the known depths of {split} are outside of depth_range "
            f"[{low:g}, {high:g}] and do not count: {counts['below']} pixels nearer, "
            f"{counts['above']} farther"
        )
        few = inside >= MOST_INSIDE
        findings.append(Finding(text, hint="" if stated or few else cure, note=few))
    if inside < MOST_INSIDE:
        return findings
    if last < SMALL * high or (last < _FITS[0] * high and fitting and not stated):
        findings.append(Finding(f"{seen}, the range ends at {high:g} m", hint=cure))
    return findings


def _fitting(
    counts: dict[str, Any], depth_range: tuple[float, float], unit: float
) -> list[tuple[str, float]]:
    """The other units in which the known depths fill the range."""
    first, _, last = (each / unit for each in counts["quantiles"])
    low, high = depth_range
    integers = counts["stored"].startswith(("uint", "int"))
    found = []
    for name, (step, of_integers) in UNITS.items():
        if abs(step / unit - 1) < 0.02 or (of_integers and not integers):
            continue
        if (counts["stored"] == "uint8") != (name.endswith("8 bit")) and of_integers:
            continue
        if first * step >= low and _FITS[0] * high <= last * step <= _FITS[1] * high:
            found.append((name, step))
    return found


def _cure(fitting: Sequence[tuple[str, float]], unit: float | None, beyond: bool) -> str:
    if unit is None:
        return "this layout has depth in a fixed unit: convert the files"
    stated = f"dataset.unit is {unit:g} m a step"
    if not fitting:
        return f"{stated}, and no usual unit fits the range: is depth_range right?"
    shown = ", or ".join(f"dataset.unit={step:.6g} ({name})" for name, step in fitting)
    return f"{stated}: did you mean {shown}{', or a farther depth_range' if beyond else ''}?"
