"""Removes all that installs wrote into a prefix, and its unit."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.errors import NotFoundError
from edgetune_runtime.store import acknowledgement, files, service, timer, versions
from edgetune_runtime.store.durable import LOCK_NAMES, changing, installing
from edgetune_runtime.store.versions import Say
from edgetune_runtime.update import state

INCOMING = "incoming"
"""Folder in the prefix where a deploy puts the description of a kit."""
# The versions last: until all are gone, uninstall can be run again.
_FOLDERS = (state.FOLDER, files.FOLDER, versions.ENVIRONMENTS, INCOMING, versions.FOLDER)


def uninstall(prefix: Path, say: Say) -> None:
    """Stop and remove the unit, then delete the versions; files of others in the prefix, and their unit, stay.

    NotFoundError if nothing is installed there, and no deploy was cut off there.
    """
    is_ours = (prefix / versions.FOLDER).is_dir() or any((prefix / name).is_file() for name in LOCK_NAMES)
    if not is_ours:
        raise NotFoundError(f"nothing is installed in {prefix}", "give the --prefix of the install")
    with installing(prefix), changing(prefix):
        unit = service.installed(prefix, say)
        if unit is not None and not unit.remove(prefix):
            say(f"unit {unit.name} stays, as it is not of {prefix}; if nobody needs it, delete {unit.unit_path}")
        updating = timer.installed(prefix, say)
        if updating is not None:
            updating.remove(prefix)
        settings = (service.SETTINGS_NAME, service.KEYS_NAME, timer.SETTINGS_NAME, acknowledgement.NAME)
        for name in (*versions.LINKS, versions.RUN_SCRIPT, *settings):
            (prefix / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            if (prefix / name).is_dir():
                shutil.rmtree(prefix / name)
        for name in LOCK_NAMES:
            (prefix / name).unlink(missing_ok=True)
    for folder in ((prefix / versions.RUN_SCRIPT).parent, prefix):
        with suppress(OSError):
            folder.rmdir()
