"""The versions of a prefix: place one, switch to it by one rename, list them, and delete those that nobody needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.atomic import flush_to_disk, raising_out_of_space
from edgetune_runtime.errors import NotFoundError
from edgetune_runtime.wording import suggestion

from . import venv
from .durable import flush_tree, replace_link, write_text
from .kit import ID_LENGTH, KIT_NAME, Kit, read_installed
from .store import Store

FOLDER = "versions"
CURRENT = "current"
PREVIOUS = "previous"
RUN_SCRIPT = "bin/edgetune-run"
# The link is resolved once, so that a switch in the middle of a start mixes no versions.
_SCRIPT = """\
#!/bin/sh
# Runs edgetune-run of the current version.
version=$(readlink -f '{current}') || exit 3
exec "$version/venv/bin/python" -I -m edgetune_runtime "$@"
"""


@dataclass(frozen=True)
class Installed:
    """One installed version; `state` is current, previous or empty."""

    kit: Kit
    state: str

    def to_json(self) -> dict[str, Any]:
        """The version as JSON values."""
        kit = self.kit
        return {"version": kit.version, "state": self.state, "bundle": kit.bundle, "engines": list(kit.engines)}


def path_of(prefix: Path, version: str) -> Path:
    """The folder of a version."""
    return prefix / FOLDER / version


def linked(prefix: Path, link: str) -> str | None:
    """The version that `current` or `previous` points to; None if there is none."""
    path = prefix / link
    return path.readlink().name if path.is_symlink() and path.exists() else None


def place(prefix: Path, kit: Kit) -> bool:
    """Make the version's folder of hard links to the store, which must have its files; whether it changed.

    In a version that is there already, the files are replaced that were damaged.
    """
    folder = path_of(prefix, kit.version)
    store = Store(prefix)
    if folder.is_dir():
        repaired = [_relink(store.path(file.sha256), folder / file.path) for file in kit.version_files]
        return any([*repaired, write_text(folder / KIT_NAME, kit.text)])
    temporary = _hidden(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    with raising_out_of_space(folder):
        temporary.mkdir(parents=True)
        for file in kit.version_files:
            target = temporary / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(store.path(file.sha256), target)
        (temporary / "venv").symlink_to(f"../../{venv.FOLDER}/{kit.wheels}")
        (temporary / KIT_NAME).write_bytes(kit.text.encode())
        flush_tree(temporary)
        temporary.rename(folder)
    flush_to_disk(folder.parent)
    return True


def switch(prefix: Path, version: str) -> None:
    """Make `version` the current one and keep the one before as `previous`."""
    before = linked(prefix, CURRENT)
    if before == version:
        return
    _write_script(prefix)
    if before is not None:
        # Before the switch: the version that runs now must be kept whenever the power is cut.
        replace_link(prefix / PREVIOUS, f"{FOLDER}/{before}")
    replace_link(prefix / CURRENT, f"{FOLDER}/{version}")


def restore(prefix: Path, links: Mapping[str, str | None]) -> None:
    """Point `current` and `previous` to these versions again."""
    for link, version in links.items():
        if version is None:
            (prefix / link).unlink(missing_ok=True)
        else:
            replace_link(prefix / link, f"{FOLDER}/{version}")


def listing(prefix: Path) -> list[Installed]:
    """The versions, the current one first, then the one before."""
    states = {linked(prefix, link): link for link in (PREVIOUS, CURRENT)}
    order = {CURRENT: 0, PREVIOUS: 1, "": 2}
    found = [Installed(read_installed(folder), states.get(folder.name, "")) for folder in _folders(prefix)]
    return sorted(found, key=lambda item: (order[item.state], item.kit.version))


def require(prefix: Path, version: str) -> Kit:
    """The kit of an installed version; NotFoundError lists the versions."""
    names = [folder.name for folder in _folders(prefix)]
    if version not in names:
        remedy = suggestion(version, names) if names else "install a kit first"
        raise NotFoundError(f"no version {version!r} in {prefix}", remedy)
    return read_installed(path_of(prefix, version))


def sweep(prefix: Path) -> None:
    """Delete versions other than the current one and the one before, and the files and environments they alone used."""
    kept = {linked(prefix, CURRENT), linked(prefix, PREVIOUS)}
    kits = [read_installed(path_of(prefix, version)) for version in kept if version is not None]
    _discard_others(prefix / FOLDER, {kit.version for kit in kits})
    _discard_others(prefix / venv.FOLDER, {kit.wheels for kit in kits})
    Store(prefix).sweep(file.sha256 for kit in kits for file in kit.version_files)


def _discard_others(root: Path, kept: set[str]) -> None:
    for folder in [path for path in root.iterdir() if path.name not in kept]:
        # Renamed first: what is left if the deletion is interrupted must not pass for a whole folder.
        hidden = folder if folder.name.startswith(".") else folder.rename(_hidden(folder))
        shutil.rmtree(hidden)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


def _relink(source: Path, target: Path) -> bool:
    if target.exists() and target.samefile(source):
        return False
    temporary = _hidden(target)
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    temporary.replace(target)
    flush_to_disk(target.parent)
    return True


def _folders(prefix: Path) -> list[Path]:
    root = prefix / FOLDER
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if len(path.name) == ID_LENGTH and (path / KIT_NAME).is_file())


def _write_script(prefix: Path) -> None:
    quoted = str((prefix / CURRENT).absolute()).replace("'", "'\\''")
    write_text(prefix / RUN_SCRIPT, _SCRIPT.replace("{current}", quoted), mode=0o755)
