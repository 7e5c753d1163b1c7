"""Installs a kit: checks everything first, then makes the version, asks it for golden answers and switches to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from edgetune_runtime.errors import NotFoundError

from . import check, golden, service, venv, versions
from .durable import locked
from .kit import Kit, read_kit
from .service import Service
from .store import Store, check_file

Say = Callable[[str], None]


def install(folder: Path, prefix: Path, *, unit: Service | None, activates: bool, say: Say) -> bool:
    """Install the kit in `folder`; whether anything changed.

    Files that the folder lacks are taken from the store. Nothing is used before its digest was compared, and the
    version that runs is not touched before the new one has answered.
    """
    kit = read_kit(folder)
    if os.geteuid() == 0:
        # The account of the unit must be able to read what root installs.
        os.umask(0o022)
    with locked(prefix):
        store = Store(prefix)
        check.require_fit(kit, prefix, disk_mb=mb_to_write(kit, prefix))
        _check_others(kit, folder)
        changed = False
        if not venv.is_complete(prefix, kit.wheels):
            say("checking the wheels and making the virtual environment")
            wheels = venv.check_wheels(kit, folder, store)
            venv.build(prefix, kit, wheels)
            changed = True
        say("checking the bundle's files")
        for file in kit.version_files:
            store.put(file, folder)
        changed |= versions.place(prefix, kit)
        if activates:
            changed |= _activate(prefix, kit, unit, say)
        return changed


def activate(prefix: Path, version: str, *, say: Say) -> bool:
    """Switch to an installed version, as `install` does; whether anything changed."""
    with locked(prefix):
        return _activate(prefix, versions.require(prefix, version), None, say)


def rollback(prefix: Path, *, say: Say) -> str:
    """Switch back to the version before, which is not asked for golden answers again; its id.

    NotFoundError if there is none.
    """
    with locked(prefix):
        before = versions.linked(prefix, versions.PREVIOUS)
        if before is None or before == versions.linked(prefix, versions.CURRENT):
            raise NotFoundError(f"{prefix} has no version before the current one", "install another kit")
        kit = versions.require(prefix, before)
        _switch(prefix, kit, service.installed(prefix), say)
        return before


def _activate(prefix: Path, kit: Kit, unit: Service | None, say: Say) -> bool:
    before, known = versions.linked(prefix, versions.CURRENT), service.installed(prefix)
    unit = unit or known
    changed = before != kit.version or (unit is not None and unit.of(kit) != known)
    if before != kit.version:
        _check_answers(prefix, kit, known, say)
    if changed:
        _switch(prefix, kit, unit, say)
    # Also if nothing changed: the install before may have been cut off here.
    versions.sweep(prefix)
    return changed


def _check_answers(prefix: Path, kit: Kit, running: Service | None, say: Say) -> None:
    """Ask the new version for golden answers while the old one serves, or instead of it where memory is short."""
    if kit.bundle is None:
        return
    say("asking for golden answers")
    if running is None or check.examine(prefix).available_mb >= kit.needs["ram_mb"]:
        answers = golden.check(prefix, kit)
    else:
        running.stop()
        try:
            answers = golden.check(prefix, kit)
        except BaseException:
            running.start(prefix, versions.require(prefix, versions.linked(prefix, versions.CURRENT) or ""))
            raise
    say("the bundle has no golden answers" if answers is None else f"{len(answers)} adapters answer as built")


def _switch(prefix: Path, kit: Kit, unit: Service | None, say: Say) -> None:
    """Switch and restart the unit; if it does not answer, go back to the version and the unit that ran, and raise."""
    links = {link: versions.linked(prefix, link) for link in (versions.PREVIOUS, versions.CURRENT)}
    known = service.installed(prefix)
    versions.switch(prefix, kit.version)
    if unit is None:
        return
    say(f"starting unit {unit.name}")
    try:
        if known is not None and known.unit_path != unit.unit_path:
            known.remove()
        unit.start(prefix, kit)
    except BaseException:
        before = links[versions.CURRENT]
        if known is None or known.unit_path != unit.unit_path:
            unit.remove()
        if before is not None:
            say(f"going back to version {before}")
            versions.restore(prefix, links)
            if known is not None:
                known.start(prefix, versions.require(prefix, before))
        raise
    service.remember(prefix, unit.of(kit))


def mb_to_write(kit: Kit, prefix: Path) -> int:
    """The disk space that installing the kit takes, in MB (10^6 bytes)."""
    store = Store(prefix)
    packages_mb = 0 if venv.is_complete(prefix, kit.wheels) else int(kit.needs["packages_mb"])
    return packages_mb + sum(file.bytes for file in kit.version_files if not store.has(file)) // 10**6


def _check_others(kit: Kit, folder: Path) -> None:
    """Compare the files that are not installed, such as the list of licences, where the folder has them."""
    installed = {*kit.wheel_files, *kit.version_files}
    for file in kit.files:
        if file not in installed and (folder / file.path).is_file():
            check_file(folder / file.path, file)
