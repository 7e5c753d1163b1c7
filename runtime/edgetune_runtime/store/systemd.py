"""Calls of systemd's service manager and of its login manager."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError

from .sockets import listens

_LOGINCTL_S = 20.0


@dataclass(frozen=True)
class Manager:
    """The service manager of the system, or of this user."""

    user: bool

    @property
    def folder(self) -> Path:
        """Where units are installed."""
        if not self.user:
            return Path("/etc/systemd/system")
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "systemd/user")

    def journal(self, name: str) -> str:
        """The command that shows what a unit printed."""
        return f"journalctl {'--user ' if self.user else ''}-u {name}"

    def call(self, *words: str) -> str:
        """Run systemctl; its standard output. IncompatibleError if it fails or is missing."""
        command = ["systemctl", *(["--user"] if self.user else []), *words]
        try:
            process = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise IncompatibleError("this system has no systemctl", "install without --service") from error
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            remedy = "install without --service"
            if self.user and "Failed to connect" in reason:
                remedy = (
                    f"log in as {user_name()} itself, such as with ssh, use sudo for a unit of the system, or {remedy}"
                )
            raise IncompatibleError(f"{' '.join(command)} failed: {reason}", remedy)
        return process.stdout

    def file_of(self, unit: str) -> Path | None:
        """The file that defines a unit, whose name or alias ends in its type, in whatever folder; None without it."""
        # A file that was put there since the last daemon-reload is not known to systemd.
        path = self.folder / unit
        shown = path if path.exists() else Path(self._shown(unit, "FragmentPath").get("FragmentPath", ""))
        return shown if shown.exists() and shown != Path() else None

    def is_active(self, name: str) -> bool:
        """Whether the unit runs."""
        return self._shown(f"{name}.service", "ActiveState").get("ActiveState") == "active"

    def serves(self, name: str, port: int) -> bool:
        """Whether the unit is active and its main process listens on the port."""
        shown = self._shown(f"{name}.service", "ActiveState", "MainPID")
        return shown.get("ActiveState") == "active" and listens(int(shown["MainPID"]), port)

    def _shown(self, unit: str, *properties: str) -> dict[str, str]:
        text = self.call("show", f"--property={','.join(properties)}", unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def user_name(uid: int | None = None) -> str:
    """The name of a user, by default the one that this process belongs to; the number if it has none."""
    import pwd  # noqa: PLC0415 - Windows has none

    uid = os.getuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def lingers() -> bool:
    """Let the units of this user run while they are not logged in; whether that is so now."""
    if _lingers():
        return True
    _loginctl("--no-ask-password", "enable-linger", user_name())
    return _lingers()


def _lingers() -> bool:
    shown = _loginctl("show-user", user_name(), "--property=Linger", "--value")
    # It fails for a user without a session.
    return shown == "yes" if shown else Path("/var/lib/systemd/linger", user_name()).exists()


def _loginctl(*words: str) -> str:
    """What loginctl prints; empty if it fails or is missing."""
    try:
        process = subprocess.run(["loginctl", *words], capture_output=True, text=True, check=False, timeout=_LOGINCTL_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
