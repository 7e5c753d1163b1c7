"""Removes all that installs wrote into a prefix, and its unit."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.formats.atomic import TEMPORARY
from edgetune_runtime.store import acknowledgement, files, service, timer, versions
from edgetune_runtime.store.durable import LOCK_NAMES, changing, installing
from edgetune_runtime.store.kit import KIT_NAME, SUMS_NAME
from edgetune_runtime.store.versions import Say
from edgetune_runtime.update import state

INCOMING = "incoming"
"""Folder in the prefix where a deploy puts the description of a kit."""


def uninstall(prefix: Path, say: Say) -> None:
    """Stop and remove the unit, then delete the versions; files of others in the prefix, and their unit, stay.

    NotFoundError if nothing is installed there, and no deploy was cut off there; UsageError for a unit of another
    account.
    """
    versions.require_installed(prefix)
    timer.require_account(prefix)
    with installing(prefix), changing(prefix):
        for unit in service.of_prefix(prefix, say):
            if not unit.remove(prefix):
                say(f"unit {unit.name} stays, as it is not of {prefix}; if nobody needs it, delete {unit.unit_path}")
        for updating in timer.of_prefix(prefix, say):
            updating.remove(prefix)
        if (prefix / service.SETTINGS_NAME).is_file():
            # Before the settings: without them, a file of this name is that of others.
            _delete_files(prefix, service.KEYS_NAME)
        _delete_files(prefix, service.SETTINGS_NAME, timer.SETTINGS_NAME, acknowledgement.NAME)
        script = prefix / versions.RUN_SCRIPT
        if versions.is_script_free(prefix):
            # Also one that is unfinished.
            _delete_files(script.parent, script.name)
        _delete_files(prefix / INCOMING, KIT_NAME, SUMS_NAME, state.ROOT_NAME)
        _delete_files(prefix / state.FOLDER, state.STATE_NAME, state.ROOT_NAME)
        trusted = prefix / state.FOLDER / state.TRUSTED_FOLDER
        if trusted.is_dir():
            shutil.rmtree(trusted)
        versions.discard_all(prefix)
        for name in (INCOMING, state.FOLDER, files.FOLDER, versions.ENVIRONMENTS, versions.FOLDER, script.parent.name):
            _delete_empty(prefix / name)
        # Last: until they are gone, uninstall can be run again.
        for name in LOCK_NAMES:
            (prefix / name).unlink(missing_ok=True)
    _delete_empty(prefix)


def _delete_files(folder: Path, *names: str) -> None:
    """Delete files with these names, also unfinished ones."""
    patterns = (pattern for name in names for pattern in (name, f"{name}.[0-9]*.part", f".{name}{TEMPORARY}*"))
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_file() or path.is_symlink():
            path.unlink()


def _delete_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
