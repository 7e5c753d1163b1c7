"""Whether the current version has proved itself in use: until it has, its starts are counted.

A version that was switched to is unacknowledged until it has given some good answers, or somebody says that it is good.
Whoever starts it counts that first; the server, which may not write to the prefix, leaves a report of its run for the
next start. A start does not count if the run ended cleanly: a device that nobody asks for days may be switched off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.formats.atomic import flush_to_disk
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.type_checks import dataclass_of

from . import versions
from .durable import write_text

NAME = "unacknowledged.json"
REPORT_VARIABLE = "EDGETUNE_RUN_REPORT"
"""Variable of the environment with the file in which a server reports its run."""
MOST_STARTS = 2
"""How often a version may be started without an acknowledgement; the next start goes back."""
GOOD_ANSWERS = 3
"""How many answers acknowledge a version."""
_LONGEST_BYTES = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Unacknowledged:
    """A version that is not acknowledged, how often it was started, and the answers that it still needs."""

    version: str
    starts: int = 0
    answers_needed: int = GOOD_ANSWERS


@dataclass(frozen=True)
class RunReport:
    """The good answers of a run of a version, and whether it ended cleanly."""

    version: str
    answers: int = 0
    has_ended: bool = False


def begin(prefix: Path, version: str, golden_prompts: int) -> None:
    """Note before a switch that the version is unacknowledged; answers to its `golden_prompts` do not count.

    What is noted of the current version stays, and holds while this is the current one.
    """
    current = read(prefix)
    noted = Unacknowledged(version, answers_needed=GOOD_ANSWERS + golden_prompts)
    _write(prefix, [noted] if current is None else [noted, current])


def read(prefix: Path) -> Unacknowledged | None:
    """What is noted of the current version; None if it is acknowledged, or the note is damaged."""
    current = versions.linked(prefix, versions.CURRENT)
    return next((each for each in _noted(prefix) if each.version == current), None)


def acknowledge(prefix: Path) -> None:
    """Take the current version as good from now on."""
    (prefix / NAME).unlink(missing_ok=True)
    flush_to_disk(prefix)


def count_start(prefix: Path) -> bool:
    """Count a start of the current version, unless it is acknowledged; whether it was started too often before.

    The lock of the prefix must be held.
    """
    pending = read(prefix)
    if pending is None:
        return False
    report = _take_report()
    if report is not None and report.version == pending.version:
        starts = max(0, pending.starts - report.has_ended)
        pending = replace(pending, starts=starts, answers_needed=pending.answers_needed - max(0, report.answers))
    if pending.answers_needed <= 0:
        acknowledge(prefix)
        return False
    if pending.starts >= MOST_STARTS:
        return True
    others = [each for each in _noted(prefix) if each.version != pending.version]
    _write(prefix, [replace(pending, starts=pending.starts + 1), *others])
    return False


def write_report(report: RunReport) -> None:
    """Leave a report for the next start, where the environment names a file for it; nothing happens if that fails."""
    path = os.environ.get(REPORT_VARIABLE)
    if path:
        with suppress(OSError, EdgetuneError):
            write_text(Path(path), json.dumps(asdict(report)))


def _take_report() -> RunReport | None:
    """The report of the last run, which is deleted; None if there is none."""
    path = Path(os.environ.get(REPORT_VARIABLE) or os.devnull)
    # The account of a unit owns the report, and root reads it: no link to a file that only root may read.
    report = _parse(path, lambda raw: dataclass_of(RunReport, raw))
    if report is not None:
        path.unlink()
    return report


def _noted(prefix: Path) -> list[Unacknowledged]:
    """The unacknowledged versions: of a switch, the one to switch to and the one before."""
    return _parse(prefix / NAME, lambda raw: [dataclass_of(Unacknowledged, each) for each in raw]) or []


def _parse(path: Path, parse: Callable[[Any], T]) -> T | None:
    """What a file of JSON holds; None if there is none, or if it is damaged."""
    try:
        with open_regular(path, follows_links=False) as file:
            return parse(json.loads(file.read(_LONGEST_BYTES)))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _write(prefix: Path, noted: Sequence[Unacknowledged]) -> None:
    write_text(prefix / NAME, json.dumps([asdict(each) for each in noted], sort_keys=True) + "\n")
