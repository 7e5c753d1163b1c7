"""Installs a kit: checks everything first, then makes the version, asks it for golden answers and switches to it."""

from __future__ import annotations

import sys
from pathlib import Path

from edgetune_runtime.store import service, switch, timer, versions
from edgetune_runtime.store.durable import changing, installing
from edgetune_runtime.store.files import Store, check_file
from edgetune_runtime.store.kit import Kit, read_kit
from edgetune_runtime.store.versions import Say

from . import check, transfer, venv


def install(folder: Path, prefix: Path, *, unit: service.Unit | None, say: Say, receives: bool = False) -> bool:
    """Install the kit in `folder` and switch to it; whether anything changed.

    Files that the folder lacks are taken from the store; with `receives`, those that are missing there are read from
    standard input first. Nothing is used before its digest was compared, and the version that runs is not touched
    before the new one has answered. UsageError for a unit of another install or account, for a port of another
    program, and for what others have in the place of a link.
    """
    kit = read_kit(folder)
    timer.require_account(prefix)
    if unit is not None:
        unit.require_own(prefix)
        # One that is damaged is replaced.
        unit.require_port(service.installed(prefix, lambda _: None))
    with installing(prefix):
        # Before anything is received.
        versions.require_free(prefix)
        store = Store(prefix)
        check.require_fit(kit, prefix, disk_mb=mb_to_write(kit, prefix))
        if receives:
            transfer.receive_lacking(prefix, kit, sys.stdin.buffer, sys.stdout)
        _check_others(kit, folder)
        changed = False
        if not versions.has_environment(prefix, kit.wheels):
            say("checking the wheels and making the virtual environment")
            venv.build(prefix, kit, folder)
            changed = True
        say("checking the bundle's files")
        for file in kit.version_files:
            store.put(file, folder)
        with changing(prefix):
            changed |= versions.place(prefix, kit)
            return switch.activate(prefix, kit, unit, say) or changed


def mb_to_write(kit: Kit, prefix: Path) -> int:
    """The disk space that installing the kit takes, in MB (10^6 bytes)."""
    packages_mb = 0 if versions.has_environment(prefix, kit.wheels) else int(kit.needs["packages_mb"])
    return packages_mb + sum(map(Store(prefix).bytes_to_write, venv.needed_files(prefix, kit))) // 10**6


def _check_others(kit: Kit, folder: Path) -> None:
    """Compare the files that are not installed, such as the list of licences, where the folder has them."""
    installed = {*kit.wheel_files, *kit.version_files}
    for file in kit.files:
        if file not in installed and (folder / file.path).is_file():
            check_file(folder / file.path, file)
