"""Makes a version the current one once it answers as built, restarts the unit, and goes back if that fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgetune_runtime.errors import EdgetuneError, NotFoundError
from edgetune_runtime.threads.machine import free_mb

from . import acknowledgement, service, timer, trial, versions
from .kit import Kit, read_installed
from .service import Unit
from .versions import Say


def activate(prefix: Path, kit: Kit, unit: Unit | None, say: Say) -> bool:
    """Make a placed version the current one when it answers as built, and sweep; whether anything changed.

    `unit` serves it, by default the one that is installed. The lock of the prefix must be held. Raises
    VerificationError if the version, or its unit, does not answer as built: the previous version still runs then.
    """
    timer.require_account(prefix)
    # One with damaged settings is replaced by a unit that is given.
    warn = say if unit is None else lambda _: None
    before, old_unit = versions.linked(prefix, versions.CURRENT), service.installed(prefix, warn)
    unit = unit or old_unit
    changed = before != kit.version or (unit is not None and unit.started_with(kit) != old_unit)
    if changed and unit is not None:
        unit.require_own(prefix)
    # A switch before may have been cut off.
    versions.settle(prefix)
    if before != kit.version:
        _check_answers(prefix, kit, old_unit, say)
    if changed:
        _switch(prefix, kit, unit, old_unit, say)
    elif unit is not None and unit.is_active(prefix):
        unit.wait()
    elif unit is not None:
        # It was stopped, or an install was killed while the unit did not run.
        say(f"starting unit {unit.name}")
        unit.start(prefix, kit)
        changed = True
    versions.settle(prefix)
    # Also if nothing changed: the install before may have been cut off here.
    versions.sweep(prefix, say)
    return changed


def _check_answers(prefix: Path, kit: Kit, old_unit: Unit | None, say: Say) -> None:
    """Ask the new version for golden answers while the old one serves, or instead of it where memory is short."""
    say("asking for golden answers")
    free = free_mb()
    if old_unit is None or free is None or free >= kit.needs["ram_mb"]:
        answers = trial.golden_answers(prefix, kit)
    else:
        try:
            old_unit.stop(prefix)
            answers = trial.golden_answers(prefix, kit)
        except BaseException:
            old_unit.resume(prefix)
            raise
    say("the bundle has no golden answers" if answers is None else f"{len(answers)} adapters answer as built")


def _switch(prefix: Path, kit: Kit, unit: Unit | None, old_unit: Unit | None, say: Say, *, asks: bool = True) -> None:
    """Switch, have the unit take over the version or restart it, and ask it for golden answers.

    If it does not answer, or not as built, goes back to the version and the unit that ran, and raises.
    """
    links = _links_before(prefix, kit, old_unit)
    is_new = unit is not None and (old_unit is None or old_unit.unit_path != unit.unit_path)
    try:
        if asks and versions.linked(prefix, versions.CURRENT) not in (None, kit.version):
            acknowledgement.begin(prefix, kit.version, 0 if unit is None else len(unit.questions(prefix, kit)))
        versions.switch(prefix, kit.version)
        if unit is None:
            return
        before = links[versions.CURRENT]
        if not is_new and before is not None and unit.takes_over(prefix, before, kit):
            say(f"unit {unit.name} has taken over the version")
        else:
            say(f"starting unit {unit.name}")
            if old_unit is not None and is_new:
                old_unit.remove(prefix)
            if is_new:
                # Before its files are there: an install that is cut off leaves what `uninstall` finds.
                service.remember(prefix, replace(unit, version=old_unit.version if old_unit is not None else ""))
            unit.start(prefix, kit)
        if asks:
            count = unit.check(prefix, kit)
            say(f"unit {unit.name} answers" + (f", {count} adapters as built" if count else ""))
    except BaseException:
        _go_back(prefix, links, unit if is_new else None, old_unit, say)
        raise
    service.remember(prefix, unit.started_with(kit))


def _links_before(prefix: Path, kit: Kit, old_unit: Unit | None) -> Mapping[str, str | None]:
    """The versions that the links point to; those before, if a switch to `kit` was cut off before the unit ran it."""
    current, previous = versions.linked(prefix, versions.CURRENT), versions.previous(prefix)
    if old_unit is not None and current == kit.version and previous == old_unit.version:
        current, previous = previous, current
    return {versions.CURRENT: current, versions.PREVIOUS: previous}


def _go_back(prefix: Path, links: Mapping[str, str | None], new: Unit | None, old_unit: Unit | None, say: Say) -> None:
    """Restore the links, remove the new unit and run the one before again; warnings are printed for what fails."""
    before = links[versions.CURRENT]
    if before is not None:
        say(f"going back to version {before}")
        versions.restore(prefix, links)
    try:
        if new is not None:
            new.remove(prefix)
            service.remember(prefix, old_unit)
        if before is not None and old_unit is not None:
            old_unit.start(prefix, read_installed(versions.path_of(prefix, before)))
    except EdgetuneError as error:
        say(f"the unit before does not run again: {error}")


def roll_back(prefix: Path, *, say: Say) -> str:
    """Switch back to the previous version, which is not asked for golden answers again; its id.

    Goes on with a rollback that was cut off. The lock of the prefix must be held. NotFoundError if there is no previous
    version.
    """
    kit, unit = _begin_rollback(prefix, say)
    try:
        # Someone who goes back does not want a strict check to keep them from it.
        _switch(prefix, kit, unit, unit, say, asks=False)
    finally:
        versions.settle(prefix)
    return kit.version


def roll_back_at_start(prefix: Path, *, say: Say) -> str:
    """Like `roll_back`, in the command that the unit runs before it starts: it then starts the previous version."""
    kit, unit = _begin_rollback(prefix, say)
    say(f"going back to version {kit.version}")
    versions.switch(prefix, kit.version)
    if unit is not None:
        unit.install(prefix, kit)
        service.remember(prefix, unit.started_with(kit))
    versions.settle(prefix)
    return kit.version


def _begin_rollback(prefix: Path, say: Say) -> tuple[Kit, Unit | None]:
    """The version to go back to, and the unit; what was counted of the current version is forgotten."""
    timer.require_account(prefix)
    before = versions.before(prefix)
    if before is None:
        raise NotFoundError(f"{prefix} has no previous version", "install another one")
    kit, unit = read_installed(versions.path_of(prefix, before)), service.installed(prefix, say)
    if unit is not None:
        unit.require_own(prefix)
    versions.begin_rollback(prefix, before)
    acknowledgement.acknowledge(prefix)
    return kit, unit
