"""Removes all that installs wrote into a prefix, and its unit."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.errors import NotFoundError
from edgetune_runtime.formats.atomic import TEMPORARY
from edgetune_runtime.store import acknowledgement, files, service, timer, versions
from edgetune_runtime.store.durable import LOCK_NAMES, changing, installing
from edgetune_runtime.store.kit import KIT_NAME, SUMS_NAME
from edgetune_runtime.store.versions import Say
from edgetune_runtime.update import state

INCOMING = "incoming"
"""Folder in the prefix where a deploy puts the description of a kit."""
_FOLDERS = (state.FOLDER, INCOMING)
_NAMES = "|".join(map(re.escape, (state.STATE_NAME, state.ROOT_NAME, state.TRUSTED_FOLDER, KIT_NAME, SUMS_NAME)))
_OWN = re.compile(rf"({_NAMES})(\.\d+\.part)?|\.({_NAMES}){TEMPORARY}.*")
"""What is written into _FOLDERS, also unfinished."""


def uninstall(prefix: Path, say: Say) -> None:
    """Stop and remove the unit, then delete the versions; files of others in the prefix, and their unit, stay.

    NotFoundError if nothing is installed there, and no deploy was cut off there.
    """
    if not versions.is_installed(prefix):
        raise NotFoundError(f"nothing is installed in {prefix}", "give the --prefix of the install")
    with installing(prefix), changing(prefix):
        unit = service.installed(prefix, say)
        if unit is not None and not unit.remove(prefix):
            say(f"unit {unit.name} stays, as it is not of {prefix}; if nobody needs it, delete {unit.unit_path}")
        updating = timer.installed(prefix, say)
        if updating is not None:
            updating.remove(prefix)
        settings = (service.SETTINGS_NAME, service.KEYS_NAME, timer.SETTINGS_NAME, acknowledgement.NAME)
        for name in (versions.RUN_SCRIPT, *settings):
            (prefix / name).unlink(missing_ok=True)
        for path in (path for name in _FOLDERS for path in (prefix / name).glob("*")):
            _delete_own(path)
        versions.discard_all(prefix)
        run_folder = Path(versions.RUN_SCRIPT).parent
        for folder in (*_FOLDERS, files.FOLDER, versions.ENVIRONMENTS, versions.FOLDER, run_folder):
            _delete_empty(prefix / folder)
        # Last: until they are gone, uninstall can be run again.
        for name in LOCK_NAMES:
            (prefix / name).unlink(missing_ok=True)
    _delete_empty(prefix)


def _delete_own(path: Path) -> None:
    if _OWN.fullmatch(path.name) is None:
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _delete_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
