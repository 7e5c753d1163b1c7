"""Reads what devices have reported into a repository's folder, and counts the devices by release."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, VerificationError
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.update.report import LONGEST_REPORT, DeviceReport, parse_report

FOLDER = "reports"
"""Folder in a repository with a file per device, DEVICE.json."""


@dataclass(frozen=True)
class ReleaseCount:
    """The devices that run a release, and how many of them have something to look at."""

    name: str
    channel: str
    release: int
    devices: int
    unacknowledged: int
    held_back: int
    failing: int
    silent: int


@dataclass(frozen=True)
class FleetStatus:
    """The releases that devices run, the reports of the devices that fail, and the number of damaged reports."""

    releases: Sequence[ReleaseCount]
    failing: Sequence[DeviceReport]
    damaged: int

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        failing = [{"device": each.device, "release": each.release, "error": each.error} for each in self.failing]
        return {"releases": [vars(each) for each in self.releases], "failing": failing, "damaged": self.damaged}


def fleet_status(repo: Path, silent_days: float) -> FleetStatus:
    """What the devices of a repository have reported; silent are those without a report for so many days.

    NotFoundError if the repository has no folder of reports.
    """
    folder = repo / FOLDER
    if not folder.is_dir():
        remedy = f"make it, and have devices report there: edgetune-run update --apply --report {folder}"
        raise NotFoundError(f"{repo} has no folder {FOLDER}", remedy)
    reports = list(_read(folder))
    by_release: dict[tuple[str, str, int], list[DeviceReport]] = defaultdict(list)
    for each in reports:
        if each is not None:
            by_release[each.name, each.channel, each.release].append(each)
    limit = datetime.now(UTC) - timedelta(days=silent_days)
    counts = [_count(key, group, limit) for key, group in sorted(by_release.items(), reverse=True)]
    failing = [each for group in by_release.values() for each in group if each.error]
    return FleetStatus(counts, failing, reports.count(None))


def _count(key: tuple[str, str, int], reports: Sequence[DeviceReport], limit: datetime) -> ReleaseCount:
    return ReleaseCount(
        *key,
        devices=len(reports),
        unacknowledged=sum(not each.acknowledged for each in reports),
        held_back=sum(bool(each.held_back) for each in reports),
        failing=sum(bool(each.error) for each in reports),
        silent=sum(datetime.fromisoformat(each.time) < limit for each in reports),
    )


def _read(folder: Path) -> Iterator[DeviceReport | None]:
    """The reports in a folder; None for each that is damaged. Whoever may write there may have put anything there."""
    for path in sorted(folder.glob("*.json")):
        try:
            # A report that is cut off is damaged.
            with open_regular(path, follows_links=False) as file:
                report = parse_report(file.read(LONGEST_REPORT))
        except (VerificationError, OSError):
            report = None
        # One device cannot speak for another one, or twice.
        yield report if report is not None and report.device == path.stem else None
