"""Judges counts of classes in two splits: pixels, boxes or images."""

from collections.abc import Sequence

from data.labelled.survey import Finding, listed, per_cent

MOST_IGNORED = 0.5  # share of a split's pixels above which a warning says so


def judge_classes(
    names: Sequence[str],
    counts: dict[str, Sequence[int]],
    noun: str,
    hint: str = "",
    *,
    one_suffices: bool = False,
) -> list[Finding]:
    """Judges the counts of each class in the splits.

    An error: a split without anything, with a single class of several, or splits that share no
    class. A warning: a class that is missing in a split.

    Args:
        names: of K classes.
        counts: split to K numbers.
        noun: what is counted: `pixel`, `box`.
        hint: the likely cause, for the errors.
        one_suffices: whether a split with a single class has a meaning.
    """
    findings = []
    for split, numbers in counts.items():
        if not sum(numbers):
            findings.append(Finding(f"{split} has no {noun} of any class", True, hint, final=True))
    if findings:
        return findings
    present = {s: {i for i, n in enumerate(numbers) if n} for s, numbers in counts.items()}
    for split, found in present.items():
        if len(found) == 1 and len(names) > 1 and not one_suffices:
            (only,) = found
            labelled = f"all labelled {_plural(noun)} of {split} ({counts[split][only]})"
            text = f"{labelled} are of one class, {names[only]!r}; expected {len(names)} classes"
            findings.append(Finding(text, True, hint))
    if not findings and not set.intersection(*present.values()):
        findings.append(Finding("train and test have no class in common", True, hint))
    return findings or _missing(names, counts, present, noun)


def _missing(
    names: Sequence[str],
    counts: dict[str, Sequence[int]],
    present: dict[str, set[int]],
    noun: str,
) -> list[Finding]:
    everywhere = [i for i in range(len(names)) if not any(i in found for found in present.values())]
    findings = []
    if everywhere:
        text = f"no {noun} anywhere of {_of(names, everywhere)}"
        findings.append(Finding(f"{text}: left out of the mean"))
    for split in counts:
        lacking = [i for i in range(len(names)) if i not in present[split] and i not in everywhere]
        if lacking:
            effect = {"train": "never learned", "test": "never counted"}[split]
            findings.append(Finding(f"no {noun} in {split} of {_of(names, lacking)}: {effect}"))
    return findings


def _of(names: Sequence[str], numbers: Sequence[int]) -> str:
    return f"{len(numbers)} of {len(names)} classes ({listed([names[i] for i in numbers])})"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("x") else f"{noun}s"


def judge_ignored(ignored: dict[str, int], total: dict[str, int]) -> list[Finding]:
    """A warning where most pixels of a split are ignored.

    Args:
        ignored: split to pixels.
        total: split to pixels.
    """
    return [
        Finding(f"{per_cent(ignored[split], total[split])} of the pixels of {split} are ignored")
        for split in total
        if ignored[split] > MOST_IGNORED * total[split]
    ]
