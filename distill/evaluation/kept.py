"""Finds measurements again: which rows of a suite still hold, and why others do not.

A row holds while the entries of model and benchmark, the seed, the weights and the data are the
same. Data of equal contents may have moved. Older versions did not record the data: their rows hold
while no file has changed since they were written.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data.labelled.digest import same_data

# The keys by which a measurement is found again, beside its entry and its data.
_IDENTITY = ("benchmark", "model", "seed", "encoder", "fingerprint")


def find_kept(
    rows: Sequence[dict[str, Any]], job: Mapping[str, Any], measured_at: float | None
) -> tuple[dict[str, Any] | None, str]:
    """The row of a measurement that need not be repeated.

    Args:
        rows: of `results.jsonl`.
        job: the identity of the measurement, with its data (None if the benchmark does not say).
        measured_at: when the files of the row were written, in seconds since 1970; None if there
            are none.

    Returns:
        The row with the entry and data of the job, or None; and what a user is told about it.
    """
    for row in rows:
        if any(row[key] != job[key] for key in _IDENTITY):
            continue
        if not _same_entry(row, job):
            continue
        holds, note = _holds(row, job, measured_at)
        if not holds:
            return None, f"measured again: {note}"
        when = row.get("measured") or _date(measured_at)
        kept = row | {key: job[key] for key in ("entry", "data") if key in job}
        return kept, f"kept from {when or 'an earlier run'}{note}"
    return None, ""


def _holds(
    row: Mapping[str, Any], job: Mapping[str, Any], measured_at: float | None
) -> tuple[bool, str]:
    """Whether a row's data are those of the job, and a note."""
    now = job["data"]
    if now is None:
        return True, ""
    then = row.get("data")
    if then is not None:
        same = same_data(then, now)
        return same, "" if same else "its data have changed since it was measured"
    if measured_at is not None and now["newest"] < measured_at:
        return True, "; an older version did not record its data, but no file has changed since"
    return False, (
        "an older version did not record its data, and files have changed since "
        f"{_date(measured_at) or 'then'}, or are copies"
    )


def _same_entry(row: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    ours, theirs = job["entry"], row["entry"]
    if ours == theirs:
        return True
    now, then = job["data"], row.get("data")
    same_contents = now and then and now["contents"] and now["contents"] == then["contents"]
    return bool(same_contents) and _without_place(ours) == _without_place(theirs)


def _without_place(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry without the place of its data."""
    kept = dict(entry)
    if isinstance(kept.get("images"), str):
        del kept["images"]
    if isinstance(kept.get("dataset"), Mapping):
        kept["dataset"] = {k: v for k, v in kept["dataset"].items() if k != "root"}
    return kept


def written_at(folder: Path) -> float | None:
    """When the newest file in a folder was written, in seconds since 1970; None if there is none.

    Of the folder of a suite: its `results.jsonl`. Of a row's: its pictures and probes.
    """
    files = [path for path in folder.glob("*") if path.is_file()]
    return max((path.stat().st_mtime for path in files), default=None)


def _date(seconds: float | None) -> str:
    return "" if seconds is None else now_text(datetime.fromtimestamp(seconds))


def now_text(time: datetime | None = None) -> str:
    """A time, or now, as `2026-12-01 10:41`."""
    return (time or datetime.now()).strftime("%Y-%m-%d %H:%M")
