"""Label maps in another coding than the one stated: 255 for a class, colours in BGR order.

Only looked at where counts of classes are suspicious.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.labelled.files import IGNORED
from data.labelled.pixel_values import read_colours, read_indices
from data.labelled.segmentation_files import Colour, PixelSample, SegmentationLayout
from data.labelled.survey import Finding, per_cent

_LOOKED_AT = 64  # label maps of a split, evenly spaced
_LEAST = 0.01  # share of a split's pixels that are 255 where they may be a class
_NEAR = 8  # levels by which JPEG or smoothing moves a colour
_MOSTLY = 0.5  # share of unknown pixels that a likely cause explains
_COMMON = 3  # unknown colours in a message


def stored_coding(dataset: SegmentationLayout, samples: Sequence[PixelSample]) -> dict[str, Any]:
    """What is stored in some label maps of a split, as JSON.

    Returns:
        `numbers`, a number in the files to its pixels; or for coloured maps `unknown`, the share of
        pixels of unknown colours, of these `swapped`, the share that would be known in BGR order,
        and `near`, that of a colour close to a known one; and `common`, the most frequent.
    """
    chosen = samples[:: max(1, len(samples) // _LOOKED_AT)][:_LOOKED_AT]
    colours = dataset.class_colours
    if colours is None:
        numbers: Counter[int] = Counter()
        for sample in chosen:
            found, counts = np.unique(read_indices(sample.target), return_counts=True)
            numbers.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        return {"numbers": {str(n): count for n, count in sorted(numbers.items())}}
    seen: Counter[Colour] = Counter()
    for sample in chosen:
        pixels = read_colours(sample.target).reshape(-1, 3)
        found, counts = np.unique(pixels, axis=0, return_counts=True)
        seen.update(dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True)))
    return _unknown_colours(seen, colours)


def _unknown_colours(seen: Counter[Colour], colours: Sequence[Colour]) -> dict[str, Any]:
    known, table = set(colours), np.array(colours)
    strangers = {colour: n for colour, n in seen.items() if colour not in known}
    unknown = max(1, sum(strangers.values()))
    swapped = sum(n for colour, n in strangers.items() if colour[::-1] in known)
    near = sum(n for c, n in strangers.items() if np.abs(table - np.array(c)).max(1).min() <= _NEAR)
    common = sorted(strangers, key=lambda colour: (-strangers[colour], colour))[:_COMMON]
    return {
        "unknown": sum(strangers.values()) / max(1, seen.total()),
        "swapped": swapped / unknown,
        "near": near / unknown,
        "common": [[*colour, strangers[colour] / seen.total()] for colour in common],
    }


def judge_numbers(
    dataset: SegmentationLayout, stored: dict[str, dict[str, Any]], missing: Sequence[int]
) -> tuple[str, list[Finding]]:
    """The likely cause of missing classes where 255 may be a class.

    Args:
        dataset: its label maps hold numbers.
        stored: split to `stored_coding`.
        missing: classes that no split has.

    Returns:
        A hint for other messages, empty if there is no cause, and findings of its own.
    """
    if dataset.void_is_stated:
        return "", []
    names, by_split = dataset.names, {s: each["numbers"] for s, each in stored.items()}
    void = str(IGNORED)
    shares = [n.get(void, 0) / max(1, sum(n.values())) for n in by_split.values()]
    found = sorted({int(number) for numbers in by_split.values() for number in numbers})
    if any(set(numbers) == {"0", void} for numbers in by_split.values()):
        cure = "renumber the files"
        if len(names) == 2:
            cure = f"set dataset.colours=[[0,0,0],[255,255,255]], or {cure}"
        hint = (
            f"labels 0 and {void} found: did you mean a binary mask with {void} as class "
            f"{len(names) - 1}, {names[-1]!r}? {void} is always ignored; {cure}"
        )
        return hint, []
    if list(missing) == [len(names) - 1] and max(shares) > _LEAST:
        text = (
            f"labels {_numbers(found)} found, none of the last class, {names[-1]!r}, and "
            f"{per_cent(max(shares), 1)} of the pixels are {void}: did you mean {void} as that "
            f"class? {void} is always ignored; renumber the files, or, if it is void, say so with "
            f"dataset.ignored=[{void}]"
        )
        return "", [Finding(text, fatal=True)]
    return "", []


def judge_colours(
    stored: dict[str, dict[str, Any]], ignored: dict[str, float]
) -> tuple[str, list[Finding]]:
    """The likely cause of unknown colours.

    Args:
        stored: split to `stored_coding`.
        ignored: split to the share of its pixels that are ignored.

    Returns:
        A hint for other messages, empty if there is no cause, and findings of its own.
    """
    findings, hint = [], ""
    for split, each in stored.items():
        if not each["unknown"]:
            continue
        common = ", ".join(f"{tuple(c[:3])} {per_cent(c[3], 1)}" for c in each["common"])
        share = per_cent(ignored[split], 1)
        if each["swapped"] > _MOSTLY:
            cause = (
                "most of these are colours of the list in BGR order, as OpenCV writes: reverse "
                "the colours of the list, or the channels of the files"
            )
            text = f"{share} of the pixels of {split} have unknown colours ({common})"
            findings.append(Finding(text, True, cause))
        elif each["near"] > _MOSTLY:
            findings.append(
                Finding(
                    f"{share} of the pixels of {split} have unknown colours ({common})",
                    hint="most of these are close to one of the list: saved as JPEG, or resized "
                    "smoothly? They are ignored",
                )
            )
        else:
            hint = hint or f"the most frequent unknown colours of {split} are {common}"
    return hint, findings


def _numbers(found: Sequence[int]) -> str:
    shown = [str(number) for number in found]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])
