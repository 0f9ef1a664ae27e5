"""Examines the data of benchmarks before any model is built or any image encoded.

Every file of every benchmark is listed and looked for, labels are read and counted once, and the
counts judged. What was found is kept in `data.json`, in the folder of the benchmark, and is not
counted again while no file changes.
"""

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import write_text
from data.labelled.digest import DigestMode, file_facts, record_of, stamp
from data.labelled.survey import Finding, Survey, require_files, told
from data.text import as_path, shown
from distill.benchmarks.benchmark import Benchmark
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS

KEPT = "data.json"
_VERSION = 1  # of what is counted; older counts are made again


def examine(
    benchmarks: Mapping[str, Benchmark],
    folder: Path | None,
    *,
    where: str = "benchmarks",
    overrule: str = "accepted_data",
    accepted: Collection[str] = (),
    mode: DigestMode = "auto",
) -> dict[str, dict[str, Any] | None]:
    """Lists, counts and judges the data of benchmarks; every rank calls this, rank 0 does it.

    Args:
        benchmarks: by name.
        folder: gets `NAME/data.json`; None to keep nothing.
        where: the section of the recipe, for messages.
        overrule: the recipe's key of `accepted`, for messages.
        accepted: names of benchmarks whose data are used although the judgement is that figures
            on them would be meaningless.
        mode: of the digest, see `record_of`.

    Returns:
        Name to the record of its data; None for a benchmark without a survey.

    Raises:
        DataError: on every rank; data are missing, cannot be read, or would give a meaningless
            figure.
    """
    if distributed.rank() != 0:
        records, message = distributed.broadcast_object(None)
        if message:
            raise DataError(message)
        return dict(records)
    examiner = _Examiner(folder, where, overrule, accepted, mode)
    try:
        records = {name: examiner.examine(name, each) for name, each in benchmarks.items()}
    except USER_ERRORS as error:
        distributed.broadcast_object(({}, str(error)))
        raise
    distributed.broadcast_object((records, ""))
    return records


class _Examiner:
    """Examines benchmarks on rank 0; those on one data set are counted once.

    Args: see `examine`.
    """

    def __init__(
        self,
        folder: Path | None,
        where: str,
        overrule: str,
        accepted: Collection[str],
        mode: DigestMode,
    ) -> None:
        self._folder, self._where, self._mode = folder, where, mode
        self._overrule, self._accepted = overrule, accepted
        self._counted: dict[str, dict[str, Any]] = {}

    def examine(self, name: str, benchmark: Benchmark) -> dict[str, Any] | None:
        """The record of a benchmark's data; prints warnings, raises what is fatal."""
        place = f"{self._where}.{shown(name)}"
        path = None if self._folder is None else self._folder / as_path(name) / KEPT
        try:
            survey = benchmark.survey()
            if survey is None:
                return None
            kept = self._count(survey, path, place)
        except USER_ERRORS as error:
            raise type(error)(f"{place}: {error}") from error
        findings = survey.judge(kept["counts"])
        if path is not None:
            judged = {"findings": [finding._asdict() for finding in findings]}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(kept | judged, indent=1))
        overrule = f"{self._overrule}=[{shown(name)}]"
        _report(findings, place, name in self._accepted, overrule)
        return dict(kept["data"])

    def _count(self, survey: Survey, path: Path | None, place: str) -> dict[str, Any]:
        """What is kept of a data set: as before while no file has changed, else counted now."""
        files = survey.files()
        require_files(survey, files)
        parsed, facts = survey.parsed(), file_facts(files, survey.root)
        for each in facts:
            if not each.size and not survey.may_be_empty:
                raise DataError(f"'{shown(each.path)}' is an empty file")
        what = [_VERSION, type(survey).__name__, survey.options, self._mode]
        key = {"what": what, "stamp": stamp(facts, parsed)}
        kept = self._counted.get(json.dumps(key)) or _kept(path, key)
        if kept is None:
            counts = survey.count()
            kept = key | {"data": record_of(facts, self._mode, parsed), "counts": counts}
        elif path is not None:
            _say(f"{place}: {survey.noun} as counted before, {shown(path)}")
        self._counted[json.dumps(key)] = kept
        return kept


def _kept(path: Path | None, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was counted before with the same key, if it was kept."""
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(found[name] == value for name, value in key.items())
        return {name: found[name] for name in (*key, "data", "counts")} if same else None
    except (OSError, ValueError, KeyError, TypeError):  # of another program, or damaged
        return None


def _report(findings: list[Finding], where: str, accepted: bool, overrule: str) -> None:
    """Prints notes and warnings; raises what is fatal."""
    fatal = [each for each in findings if each.final or (each.fatal and not accepted)]
    rest = [each for each in findings if each not in fatal]
    for finding, line in zip(rest, told(rest), strict=True):
        _say(f"{'' if finding.note else 'warning: '}{where}: {line}")
    if fatal:
        lines = told(fatal)
        text = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  - {each}" for each in lines)
        final = any(each.final for each in fatal)
        end = "" if final else f"\nTo measure all the same: {overrule}"
        raise DataError(f"{where}:{text}{end}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
