"""Reports what a device runs, where its user wants that: a file in a folder, or a POST to an address."""

from __future__ import annotations

import json
import re
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edgetune_runtime import __version__
from edgetune_runtime.errors import EdgetuneError, NotFoundError, UsageError, VerificationError, parsing
from edgetune_runtime.store import acknowledgement
from edgetune_runtime.store.durable import write_text
from edgetune_runtime.store.versions import Say
from edgetune_runtime.type_checks import dataclass_of
from edgetune_runtime.wording import printable, shortened

from .current import current_kit
from .http_client import HttpClient
from .release import NAME
from .state import read_state, refuse_login

if TYPE_CHECKING:
    from edgetune_runtime.store.kit import Kit

    from .update import DeviceRelease

NOBODY = "off"
"""Instead of an address: reports end."""
LONGEST_REPORT = 10_000
"""Size of a report in bytes."""
_ID = re.compile("[0-9a-f]{32}")
_ADDRESS = re.compile("https?://[!-~]+")


@dataclass(frozen=True)
class DeviceReport:
    """What a device runs after it has looked for an update.

    `release` is 0 for a bundle that a kit has brought. `held_back` says why the device does not take the newest
    release, and `error` why the update failed; they are empty otherwise. `refused` are releases that it has left out.
    """

    device: str
    name: str
    channel: str
    release: int
    bundle: str
    runtime: str
    time: str
    acknowledged: bool
    refused: int = 0
    held_back: str = ""
    error: str = ""


def parse_report(data: bytes) -> DeviceReport:
    """The report in a file; VerificationError if it is not a report."""
    with parsing("the report is damaged", "delete it"):
        report = dataclass_of(DeviceReport, json.loads(data))
        is_named = _ID.fullmatch(report.device) and all(map(NAME.fullmatch, (report.name, report.channel)))
        has_time = datetime.fromisoformat(report.time).tzinfo is not None
        texts = (report.bundle, report.runtime, report.held_back, report.error)
        if not is_named or not has_time or report.release < 0 or any(text != printable(text) for text in texts):
            raise ValueError(f"it is not what a device writes: {str(report)[:150]!r}")
    return report


def checked_address(where: str) -> str:
    """Where reports go; a folder's whole path. UsageError if it is neither an address without a login nor a folder."""
    refuse_login("--report", where)
    if where == NOBODY or _is_address(where):
        return where
    if "://" in where or not Path(where).is_dir():
        message = f"--report {where!r} is neither an address nor a folder"
        raise UsageError(message, f"use https://HOST/PATH in ASCII, a folder, or {NOBODY}")
    return str(Path(where).absolute())


def _is_address(where: str) -> bool:
    """Whether something can be sent to it."""
    try:
        parts = urlsplit(where)
        _ = parts.port
        # As for a connection: no empty label, and none that is too long.
        host = (parts.hostname or "").encode("idna")
    except ValueError:
        return False
    return bool(host) and _ADDRESS.fullmatch(where) is not None


def report(prefix: Path, say: Say, newest: DeviceRelease | None = None, *, error: EdgetuneError | None = None) -> None:
    """Report what a prefix runs after an update, or why that failed, if its user wants that; warns if that fails.

    `newest` is what the update found.
    """
    try:
        state = read_state(prefix)
        if state.report_to in {"", NOBODY}:
            return
        kit = None
        with suppress(NotFoundError, VerificationError):
            # If it is damaged, the update has failed with that error.
            kit = current_kit(prefix)
        about = DeviceReport(
            device=state.device,
            name=state.bundle,
            channel=state.channel,
            release=_release_of(kit, newest),
            bundle="" if kit is None else kit.bundle,
            runtime=__version__,
            time=max(datetime.now(UTC), state.time).isoformat(timespec="seconds"),
            acknowledged=acknowledgement.read(prefix) is None,
            refused=len(state.refused),
            held_back=shortened((newest and newest.choice.held_back) or ""),
            error="" if error is None else shortened(str(error)),
        )
        _send(state.report_to, about)
    except (EdgetuneError, OSError, ValueError) as problem:
        say(f"the report was not sent: {problem}")


def _release_of(kit: Kit | None, newest: DeviceRelease | None) -> int:
    """The release that runs: the newest one if it has the same bundle, which was released again for more devices."""
    if kit is None:
        return 0
    return newest.release.version if newest is not None and newest.release.bundle == kit.bundle else kit.release


def _send(where: str, about: DeviceReport) -> None:
    text = json.dumps(asdict(about), indent=1) + "\n"
    if not where.startswith(("http://", "https://")):
        # A stick or a share that is not mounted: a folder in its place would be found by nobody.
        if not Path(where).is_dir():
            raise NotFoundError(f"there is no folder {where}", f"mount it, or end the reports: --report {NOBODY}")
        write_text(Path(where, f"{about.device}.json"), text)
        return
    headers = {"Content-Type": "application/json"}
    # A POST follows no redirect: the report is for the address that the user gave, and for no other.
    with closing(HttpClient("edgetune-run")) as http, http.reply("POST", where, headers, text.encode()):
        pass
