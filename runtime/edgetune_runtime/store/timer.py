"""The systemd timer of daily updates: of the system for root, of the user for others."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.type_checks import dataclass_of

from . import service, versions
from .durable import write_text
from .service import NAME, as_argument, escaped, is_of, names_by_files, owner_line
from .systemd import Manager, user_name
from .versions import Say

SETTINGS_NAME = "timer.json"
_TIMER = """\
{owner}
[Unit]
Description=Update edgetune {bundle} once a day

[Timer]
OnCalendar=daily
# Not all devices ask at the same time.
RandomizedDelaySec=6h
Persistent=yes

[Install]
WantedBy=timers.target
"""
# It writes to the prefix and to the folder of units, and asks a new version in a confined process of its own.
_SERVICE = """\
{owner}
[Unit]
Description=Update edgetune {bundle}
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart={script} update --apply --prefix {prefix}
TimeoutStartSec=6h
Nice=10
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native
{sandbox}"""
# These need rights that a user's service manager does not have.
_SYSTEM_SANDBOX = """\
ProtectSystem=yes
ReadWritePaths={prefix}
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
PrivateDevices=yes
PrivateTmp={private_tmp}
"""
_TEMPORARY = ("/tmp", "/var/tmp")


@dataclass(frozen=True)
class Timer:
    """Name of a prefix's timer and of the unit that it starts, and whether they belong to a user's service manager."""

    name: str
    user: bool

    @property
    def manager(self) -> Manager:
        """The service manager that runs it."""
        return Manager(self.user)

    def units(self, prefix: Path, bundle: str) -> dict[str, str]:
        """The texts of the files of units by their names."""
        owner, prefix = owner_line(prefix), prefix.absolute()
        sandbox = "" if self.user else _system_sandbox(prefix)
        script, folder = escaped(prefix / versions.RUN_SCRIPT), as_argument(prefix)
        service = _SERVICE.format(owner=owner, bundle=bundle, script=script, prefix=folder, sandbox=sandbox)
        # The timer first: an install that was cut off between them leaves what `remove` can disable.
        return {f"{self.name}.timer": _TIMER.format(owner=owner, bundle=bundle), f"{self.name}.service": service}

    def require_own(self, prefix: Path) -> None:
        """UsageError if there is a unit of this name that no install into `prefix` wrote."""
        for unit in self.units(prefix, ""):
            path = self.manager.file_of(unit)
            if path is not None and not is_of(path, prefix):
                raise UsageError(f"unit {unit} exists and is not of {prefix}: {path}", "remove it first")

    def install(self, prefix: Path, bundle: str) -> None:
        """Write the units of the timer, start it and remember it; errors as those of `require_own`."""
        self.require_own(prefix)
        write_text(prefix / SETTINGS_NAME, json.dumps(asdict(self), sort_keys=True) + "\n")
        for name, text in self.units(prefix, bundle).items():
            write_text(self.manager.folder / name, text)
        self.manager.call("daemon-reload")
        self.manager.call("enable", "--quiet", "--now", f"{self.name}.timer")

    def remove(self, prefix: Path) -> None:
        """Stop the timer and delete its units, where they are those of `prefix`."""
        paths = [self.manager.folder / name for name in self.units(prefix, "")]
        own = [path for path in paths if is_of(path, prefix)]
        timer = f"{self.name}.timer"
        if self.manager.folder / timer in own:
            self.manager.call("disable", "--quiet", "--now", timer)
        for word in ("stop", "reset-failed") if own else ():
            # A unit that neither runs nor has failed may not be loaded.
            with suppress(IncompatibleError):
                self.manager.call(word, f"{self.name}.service")
        # The timer last, so that a removal that was cut off can be run again.
        for path in reversed(own):
            path.unlink()
        if own:
            self.manager.call("daemon-reload")


def _system_sandbox(prefix: Path) -> str:
    """What the update of a system may write: the prefix too, wherever it is."""
    is_temporary = any(prefix.resolve().is_relative_to(folder) for folder in _TEMPORARY)
    return _SYSTEM_SANDBOX.format(prefix=escaped(prefix), private_tmp="no" if is_temporary else "yes")


def require_account(prefix: Path) -> None:
    """UsageError if another service manager than that of this account runs the unit or the timer of this prefix."""
    for name, read in ((service.SETTINGS_NAME, service.installed), (SETTINGS_NAME, installed)):
        settings = read(prefix, lambda _: None)
        if settings is None or settings.user == (os.geteuid() != 0):
            continue
        if (owner := (prefix / name).stat().st_uid) != os.geteuid():
            user = user_name(owner)
            message = f"{prefix / name} is of user {user}, whose systemd runs it"
            raise UsageError(message, f"log in as {user}, such as with ssh, and give the command again")


def installed(prefix: Path, say: Say) -> Timer | None:
    """The timer of this prefix; None if it has none, or if its settings are damaged; a warning is printed."""
    path = prefix / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        timer = dataclass_of(Timer, json.loads(path.read_text(encoding="utf-8")))
        if not NAME.fullmatch(timer.name):
            raise ValueError(f"name is {timer.name!r}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        say(f"{path} is damaged, so the timer is left as it is ({error})")
        return None
    return timer


def of_prefix(prefix: Path, say: Say) -> list[Timer]:
    """The timer to remove with this prefix; if its settings are damaged, those that an install into it wrote."""
    damage: list[str] = []
    timer = installed(prefix, damage.append)
    if not damage:
        return [] if timer is None else [timer]
    found = names_by_files(prefix, prefix / SETTINGS_NAME, "timer", say)
    return [Timer(name, os.geteuid() != 0) for name in found]
