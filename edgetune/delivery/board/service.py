"""The systemd unit of `edgetune-run serve`: a system unit for root, a user unit for others."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError, UsageError, VerificationError

from . import versions
from .durable import write_text
from .kit import BUNDLE_FOLDER, Kit

SETTINGS_NAME = "service.json"
KEYS_NAME = "keys"
HERE = "127.0.0.1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_READY_S = 180.0
_UNIT = """\
[Unit]
Description=edgetune {bundle}
After=network.target

[Service]
Type=exec
ExecStart={python} -I -m edgetune_runtime serve {path} --engine {engine} --host {host} --port {port}{keys} --warm
WorkingDirectory=/
Environment=EDGETUNE_CACHE=%C/{name}
CacheDirectory={name}
Restart=on-failure
RestartSec=5
MemoryMax={memory_mb}M
OOMPolicy=stop
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
{sandbox}
[Install]
WantedBy={target}
"""
# These need rights that a user's service manager does not have.
_SYSTEM_SANDBOX = """\
DynamicUser=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome={protect_home}
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
PrivateDevices=yes
PrivateTmp=yes
"""


@dataclass(frozen=True)
class Service:
    """Name and address of a prefix's unit, and whether it belongs to a user's service manager.

    `version` is the one that it was last started with by an install.
    """

    name: str
    port: int
    user: bool
    host: str = HERE
    version: str = ""

    @property
    def url(self) -> str:
        """The server's address for this machine."""
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:
            return f"http://{'[::1]' if address.version == 6 else HERE}:{self.port}"
        return f"http://{f'[{address}]' if address.version == 6 else address}:{self.port}"

    @property
    def needs_key(self) -> bool:
        """Whether other machines can reach the server."""
        return not ipaddress.ip_address(self.host).is_loopback

    def of(self, kit: Kit) -> Service:
        """The same unit after a start with this version."""
        return replace(self, version=kit.version)

    @property
    def unit_path(self) -> Path:
        """The unit's file."""
        if not self.user:
            return Path("/etc/systemd/system", f"{self.name}.service")
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        return home / "systemd/user" / f"{self.name}.service"

    def unit(self, prefix: Path, kit: Kit) -> str:
        """The unit's text for the current version in `prefix`."""
        current = prefix.absolute() / versions.CURRENT
        sandbox = "" if self.user else _SYSTEM_SANDBOX.format(protect_home=_protect_home(prefix))
        keys = prefix.absolute() / KEYS_NAME
        if self.needs_key and not self.user:
            # Only root reads the file: systemd hands a copy to the unit's own account.
            sandbox += f"LoadCredential={KEYS_NAME}:{str(keys).replace('%', '%%')}\n"
        return _UNIT.format(
            bundle=kit.name,
            python=_escaped(current / "venv/bin/python"),
            path=_escaped(current / BUNDLE_FOLDER),
            engine=kit.engines[0],
            host=self.host,
            port=self.port,
            keys=f" --api-key-file {_escaped(keys) if self.user else f'%d/{KEYS_NAME}'}" if self.needs_key else "",
            name=self.name,
            memory_mb=kit.service["memory_max_mb"] * 10**6 // 2**20,
            sandbox=sandbox,
            target="default.target" if self.user else "multi-user.target",
        )

    def start(self, prefix: Path, kit: Kit) -> None:
        """Write the unit if it changed, start or restart it, and wait until it answers.

        VerificationError if it does not, with its last message.
        """
        if self.needs_key and not (prefix / KEYS_NAME).exists():
            write_text(prefix / KEYS_NAME, f"{secrets.token_hex(32)}\n", mode=0o600)
        if write_text(self.unit_path, self.unit(prefix, kit)):
            self._systemctl("daemon-reload")
            self._systemctl("enable", "--quiet", self.name)
        self._systemctl("restart", self.name)
        self.wait()

    def stop(self) -> None:
        """Stop the unit; does nothing if it does not run."""
        self._systemctl("stop", self.name)

    def remove(self) -> None:
        """Stop the unit and delete it."""
        if self.unit_path.exists():
            self._systemctl("disable", "--quiet", "--now", self.name)
            self.unit_path.unlink()
            self._systemctl("daemon-reload")

    def wait(self) -> None:
        """Wait until the unit answers; VerificationError if it does not."""
        url = f"{self.url}/readyz"
        end = time.monotonic() + _READY_S
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        where = "journalctl --user" if self.user else "journalctl"
        raise VerificationError(f"unit {self.name} does not answer at {url}", f"see {where} -u {self.name}")

    def _systemctl(self, *words: str) -> None:
        command = ["systemctl", *(["--user"] if self.user else []), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise IncompatibleError("this system has no systemctl", "install without --service") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise IncompatibleError(f"{' '.join(command)} failed: {reason}", "install without --service")


def wanted(name: str, host: str, port: int) -> Service:
    """The unit that this user asks for; UsageError for a name that systemd would not take, or a wrong address."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"--service {name!r} is no name of a unit", "use letters, digits, _, . and -")
    if not 0 < port < 1 << 16:
        raise UsageError(f"--port {port} is no port", "use 1 to 65535")
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise UsageError(f"--host {host!r} is no IP address", "use 0.0.0.0 to let others in") from error
    if shutil.which("systemctl") is None:
        raise IncompatibleError("this system has no systemctl", "install without --service")
    return Service(name, port, os.geteuid() != 0, host)


def installed(prefix: Path) -> Service | None:
    """The unit of this prefix; None if it has none."""
    path = prefix / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        return Service(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise VerificationError(f"{path} is damaged: {error}", "install the kit again with --service") from error


def remember(prefix: Path, service: Service) -> None:
    """Store the settings of the unit."""
    write_text(prefix / SETTINGS_NAME, json.dumps(asdict(service), sort_keys=True) + "\n")


def _protect_home(prefix: Path) -> str:
    is_at_home = any(prefix.resolve().is_relative_to(home) for home in ("/home", "/root", "/run/user"))
    return "read-only" if is_at_home else "yes"


def _escaped(path: Path) -> str:
    """A path as a word of ExecStart: systemd expands % and $, and splits at spaces."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"'
