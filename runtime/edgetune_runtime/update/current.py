"""The current version of a device: its record, whether it is acknowledged, and how to go back from it.

It needs no library of an extra.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import BusyError, NotFoundError, VerificationError
from edgetune_runtime.store import acknowledgement, switch, versions
from edgetune_runtime.store.durable import locked
from edgetune_runtime.store.kit import BUNDLE_FOLDER, Kit, read_installed
from edgetune_runtime.store.versions import Say

from .state import UpdateState, read_state, write_state

WENT_BACK = "this device went back from it"
_STARTED_OFTEN = f"it was started {acknowledgement.MOST_STARTS} times without a clean exit, and not acknowledged"
_GO_BACK = "go back with `edgetune-run update --rollback`, or install the kit again"


def current_kit(prefix: Path) -> Kit | None:
    """The description of the current version; None if there is none."""
    version = versions.linked(prefix, versions.CURRENT)
    return None if version is None else read_installed(versions.path_of(prefix, version), _GO_BACK)


def status(prefix: Path, say: Say) -> dict[str, Any]:
    """What is installed and remembered, as JSON values; asks nobody."""
    state = read_state(prefix)
    installed = [{**item.to_json(), "release": item.kit.release} for item in versions.listing(prefix, say)]
    if not installed and state == UpdateState():
        raise _nothing_in(prefix)
    return {
        "prefix": str(prefix),
        "path": str(prefix / versions.CURRENT / BUNDLE_FOLDER),
        "repo": state.repo,
        "name": state.bundle,
        "channel": state.channel,
        "versions": installed,
        "acknowledged": acknowledgement.read(prefix) is None,
        "report_to": state.report_to,
        "quota_mb": state.quota_mb,
        "floors": dict(state.floors),
        "refused": dict(state.refused),
        "failures": dict(state.failures),
    }


def roll_back(prefix: Path, reason: str, say: Say) -> str:
    """Go back to the previous version, and refuse the bundle that runs now from then on, for this reason; its id.

    NotFoundError if there is no previous version.
    """
    with locked(prefix):
        _refuse_current(prefix, reason, say)
        return switch.roll_back(prefix, say=say)


def mark_good(prefix: Path) -> str:
    """Acknowledge the current version; its id. NotFoundError if there is none."""
    version = _current_version(prefix)
    with locked(prefix):
        acknowledgement.acknowledge(prefix)
    return version


def count_start(prefix: Path, say: Say) -> str:
    """Count a start of the current version, and go back if it is one too many; the id of the version to start.

    A rollback that was cut off is completed. Nothing is counted while an install or an update switches, and watches
    the start itself. NotFoundError if nothing is installed.
    """
    version = _current_version(prefix)
    try:
        with locked(prefix):
            is_unfinished = versions.linked(prefix, versions.ROLLING_BACK) is not None
            if is_unfinished or acknowledgement.count_start(prefix):
                _refuse_current(prefix, _STARTED_OFTEN, say)
                version = switch.roll_back_at_start(prefix, say=say)
    except BusyError:
        say("an install or an update switches to a version, so this start is not counted")
    return version


def _refuse_current(prefix: Path, reason: str, say: Say) -> None:
    """Leave the bundle of the current version out once it is gone back from; a warning where something is damaged."""
    before = versions.before(prefix)
    try:
        state, current = read_state(prefix), current_kit(prefix)
        if before is not None and current is not None and current.version != before:
            kit = read_installed(versions.path_of(prefix, before))
            refused = {**state.refused, current.bundle: reason}
            refused.pop(kit.bundle, None)
            write_state(prefix, replace(state, refused=refused))
    except (NotFoundError, VerificationError) as error:
        say(f"the bundle that runs now is not skipped in later updates: {error}")


def _current_version(prefix: Path) -> str:
    version = versions.linked(prefix, versions.CURRENT)
    if version is None:
        raise _nothing_in(prefix)
    return version


def _nothing_in(prefix: Path) -> NotFoundError:
    return NotFoundError(f"nothing is installed in {prefix}", "give another --prefix, or update with --apply")
