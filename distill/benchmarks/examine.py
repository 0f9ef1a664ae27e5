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
from data.labelled.survey import Finding, require_files, told
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
    try:
        records = {}
        for name, each in benchmarks.items():
            place, own = f"{where}.{shown(name)}", folder and folder / as_path(name)
            found = _examine(each, own, place, mode)
            records[name] = None if found is None else found[0]
            if found is not None:
                _report(found[1], place, name in accepted, f"{overrule}=[{shown(name)}]")
    except USER_ERRORS as error:
        distributed.broadcast_object(({}, str(error)))
        raise
    distributed.broadcast_object((records, ""))
    return records


def _examine(
    benchmark: Benchmark, folder: Path | None, where: str, mode: DigestMode
) -> tuple[dict[str, Any], list[Finding]] | None:
    """The record of a benchmark's data, and what is wrong with them."""
    try:
        survey = benchmark.survey()
        if survey is None:
            return None
        files = survey.files()
        require_files(survey, files)
        parsed, facts = survey.parsed(), file_facts(files, survey.root)
        for each in facts:
            if not each.size and not survey.may_be_empty:
                raise DataError(f"'{shown(each.path)}' is an empty file")
        entry = benchmark.config.model_dump(mode="json")
        key = {"version": _VERSION, "entry": entry, "stamp": stamp(facts, parsed), "mode": mode}
        kept = _kept(folder, key)
        if kept is None:
            counts = survey.count()
            kept = {"data": record_of(facts, mode, parsed), "counts": counts}
        elif folder is not None:
            _say(f"{where}: {survey.noun} as counted before, {shown(folder / KEPT)}")
    except USER_ERRORS as error:
        raise type(error)(f"{where}: {error}") from error
    findings = survey.judge(kept["counts"])
    if folder is not None:
        told = {"findings": [finding._asdict() for finding in findings]}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / KEPT, json.dumps(key | kept | told, indent=1))
    return kept["data"], findings


def _kept(folder: Path | None, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was counted before with the same key, if it was kept."""
    if folder is None or not (folder / KEPT).is_file():
        return None
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        same = all(found[name] == value for name, value in key.items())
        return {name: found[name] for name in ("data", "counts")} if same else None
    except (OSError, ValueError, KeyError, TypeError):  # of another program, or damaged
        return None


def _report(findings: list[Finding], where: str, accepted: bool, overrule: str) -> None:
    """Prints warnings; raises what is fatal."""
    fatal = [each for each in findings if each.final or (each.fatal and not accepted)]
    for line in told(each for each in findings if each not in fatal):
        _say(f"warning: {where}: {line}")
    if fatal:
        lines = told(fatal)
        text = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  - {each}" for each in lines)
        final = any(each.final for each in fatal)
        end = "" if final else f"\nTo measure all the same: {overrule}"
        raise DataError(f"{where}:{text}{end}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
