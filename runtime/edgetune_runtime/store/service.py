"""The systemd unit of `edgetune-run serve`: a system unit for root, a user unit for others."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from edgetune_runtime.errors import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.type_checks import dataclass_of

from . import acknowledgement, answers, sockets, versions
from .durable import write_text
from .kit import BUNDLE_FOLDER, Kit
from .systemd import Manager
from .versions import Say

SETTINGS_NAME = "service.json"
KEYS_NAME = "keys"
LOOPBACK = "127.0.0.1"
PORT = 8080
"""Where a unit listens unless the kit or an option says otherwise."""
NAME_START = "edgetune-"
"""How the names of units begin unless others are given."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NOT_IN_PROGRAMS = re.compile(r"""['"\\\x00-\x1f\x7f]""")
_RELOAD_S = 10.0
"""Seconds in which a server takes over adapters; one that has not is restarted."""
_READY_S, _WARM_S = 180.0, 1800.0
"""Seconds until a unit that does not answer has failed, and until one has that computes the states of its prompts."""
_STATES = ("--warm", "--disk-mb-per-day", "0")
"""Calls write no states: a client that sends other prompts again and again would wear out an SD card."""
_OWNER = "# Installed by edgetune for {prefix}"
# What runs before each start may change the prefix (+), and the unit starts even if it fails (-). No preflight: the
# version was asked for golden answers in a confined process, and the memory is measured for one.
_UNIT = """\
{owner}
[Unit]
Description=edgetune {bundle}
After=network.target

[Service]
Type=exec
ExecStartPre=-+{python} -I -m edgetune_runtime update --starting --prefix {prefix}
ExecStart={python} -I -m edgetune_runtime serve {path} --engine {engine} --host {host} --port {port}{more}
WorkingDirectory=/
Environment=EDGETUNE_CACHE=%C/{name} EDGETUNE_PREFLIGHT=0 {report}=%S/{name}/run.json
CacheDirectory={name}
CacheDirectoryMode=0700
StateDirectory={name}
StateDirectoryMode=0700
Restart=on-failure
RestartSec=5
MemoryMax={memory_mb}M
LimitNOFILE=4096
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
class Unit:
    """Name and address of a prefix's unit, and whether it belongs to a user's service manager.

    `version` is the one that it was last started with by an install.
    """

    name: str
    port: int
    user: bool
    host: str = LOOPBACK
    version: str = ""

    @property
    def url(self) -> str:
        """The server's address for this machine."""
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:
            return f"http://{'[::1]' if address.version == 6 else LOOPBACK}:{self.port}"
        return f"http://{f'[{address}]' if address.version == 6 else address}:{self.port}"

    @property
    def needs_key(self) -> bool:
        """Whether other machines can reach the server."""
        return not ipaddress.ip_address(self.host).is_loopback

    def started_with(self, kit: Kit) -> Unit:
        """The same unit after a start with this version."""
        return replace(self, version=kit.version)

    @property
    def manager(self) -> Manager:
        """The service manager that runs it."""
        return Manager(self.user)

    @property
    def unit_path(self) -> Path:
        """The unit's file."""
        return self.manager.folder / f"{self.name}.service"

    def unit(self, prefix: Path, kit: Kit) -> str:
        """The unit's text for the current version in `prefix`."""
        current = prefix.absolute() / versions.CURRENT
        sandbox = "" if self.user else _SYSTEM_SANDBOX.format(protect_home=_protect_home(prefix))
        keys = prefix.absolute() / KEYS_NAME
        if self.needs_key and not self.user:
            # Only root reads the file: systemd hands a copy to the unit's own account.
            sandbox += f"LoadCredential={KEYS_NAME}:{str(keys).replace('%', '%%')}\n"
        more = [*kit.opening.words(), *_STATES]
        if self.needs_key:
            more += ["--api-key-file", as_argument(keys) if self.user else f"%d/{KEYS_NAME}"]
        return _UNIT.format(
            bundle=kit.name,
            owner=owner_line(prefix),
            python=escaped(current / "venv/bin/python"),
            prefix=as_argument(prefix.absolute()),
            report=acknowledgement.REPORT_VARIABLE,
            path=as_argument(current / BUNDLE_FOLDER),
            engine=kit.engines[0],
            host=self.host,
            port=self.port,
            more="".join(f" {word}" for word in more),
            name=self.name,
            memory_mb=kit.service["memory_max_mb"] * 10**6 // 2**20,
            sandbox=sandbox,
            target="default.target" if self.user else "multi-user.target",
        )

    def require_own(self, prefix: Path) -> None:
        """UsageError if there is a unit of this name that no install into `prefix` wrote."""
        path = self.manager.file_of(self.unit_path.name)
        if path is not None and not is_of(path, prefix):
            message = f"unit {self.name} exists and is not of {prefix}: {path}"
            raise UsageError(message, "choose another name: --service NAME")

    def require_port(self, before: Unit | None) -> None:
        """UsageError if another program listens on the port than the unit, or the one `before`, which it replaces."""
        if not any(unit.manager.serves(unit.name, self.port) for unit in (self, before) if unit is not None):
            sockets.require_free(self.host, self.port)

    def install(self, prefix: Path, kit: Kit) -> None:
        """Write the unit if it changed, and have systemd read it; it starts with the system from now on.

        UsageError, before anything is written, if the unit of this name is not that of `prefix`.
        """
        self.require_own(prefix)
        if self.needs_key and not (prefix / KEYS_NAME).exists():
            write_text(prefix / KEYS_NAME, f"{secrets.token_hex(32)}\n", mode=0o600)
        write_text(self.unit_path, self.unit(prefix, kit))
        # Also if the text was there already: the install that wrote it may have been cut off here.
        self.manager.call("daemon-reload")
        self.manager.call("enable", "--quiet", self.name)

    def start(self, prefix: Path, kit: Kit) -> None:
        """Install the unit, start or restart it, and wait until it answers.

        VerificationError if it does not; UsageError as `install`, and if another program has the port.
        """
        self.install(prefix, kit)
        # Stopped first, as then whoever has the port is not this unit.
        self.stop(prefix)
        sockets.require_free(self.host, self.port)
        self.resume(prefix)

    def takes_over(self, prefix: Path, before: str, kit: Kit) -> bool:
        """Have the running unit take over a version without a restart; False if it must be restarted.

        That needs the environment and the base of `before`, the version that it runs.
        """
        if not self.is_active(prefix) or self.unit_path.read_text(encoding="utf-8") != self.unit(prefix, kit):
            return False
        running, new = (versions.path_of(prefix, version) for version in (before, kit.version))
        if versions.environment_of(running) != versions.environment_of(new):
            return False
        if not answers.have_same_base(running / BUNDLE_FOLDER, new / BUNDLE_FOLDER):
            return False
        with suppress(IncompatibleError):
            self.manager.call("kill", "--kill-who=main", "--signal=HUP", self.name)
        end = time.monotonic() + _RELOAD_S
        while answers.served_bundle(self.url) != kit.bundle:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        self.wait()
        return True

    def resume(self, prefix: Path) -> None:
        """Start the unit as it is, if it is that of `prefix`, and wait until it answers; errors as those of `wait`."""
        if is_of(self.unit_path, prefix):
            self.manager.call("restart", self.name)
            self.wait()

    def is_active(self, prefix: Path) -> bool:
        """Whether the unit is that of `prefix` and runs."""
        return is_of(self.unit_path, prefix) and self.manager.is_active(self.name)

    def stop(self, prefix: Path) -> None:
        """Stop the unit; does nothing if it does not run, or is not that of `prefix`."""
        if is_of(self.unit_path, prefix):
            self.manager.call("stop", self.name)

    def remove(self, prefix: Path) -> bool:
        """Stop the unit and delete it; False if it is not that of `prefix`, and stays.

        Its cache and state go too if its name begins with `edgetune-`: in folders of another name may be other files.
        """
        if not self.unit_path.exists():
            return True
        if not is_of(self.unit_path, prefix):
            return False
        self.manager.call("disable", "--quiet", "--now", self.name)
        if self.name.startswith(NAME_START):
            for words in (("reset-failed",), ("clean", "--what=all")):
                # A unit that has not failed may not be loaded, and systemd before 243 cannot clean.
                with suppress(IncompatibleError):
                    self.manager.call(*words, self.name)
        self.unit_path.unlink()
        self.manager.call("daemon-reload")
        return True

    def wait(self) -> None:
        """Wait until the unit itself answers; VerificationError if it does not."""
        begin = heard = time.monotonic()
        # Some servers are there at once, others take minutes.
        pause_s = 0.05
        while time.monotonic() < min(heard + _READY_S, begin + _WARM_S):
            # Another program may have the port while the unit fails to start again and again.
            if answers.is_alive(self.url) and self.manager.serves(self.name, self.port):
                heard = time.monotonic()
                if answers.is_ready(self.url):
                    return
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.5)
        message = f"unit {self.name} does not answer at {self.url}/readyz"
        raise VerificationError(message, f"see {self.manager.journal(self.name)}")

    def questions(self, prefix: Path, kit: Kit) -> list[answers.Question]:
        """What `check` asks for."""
        return answers.questions(versions.path_of(prefix, kit.version) / BUNDLE_FOLDER, kit.engines[0])

    def check(self, prefix: Path, kit: Kit) -> int:
        """Ask the running unit for the golden answers of the kit's bundle; the number of adapters that have one.

        VerificationError for an adapter that does not answer, or answers differently.
        """
        questions = self.questions(prefix, kit)
        key = (prefix / KEYS_NAME).read_text(encoding="utf-8").split()[0] if self.needs_key else None
        try:
            answers.check(self.url, key, questions)
        except VerificationError as error:
            remedy = f"see {self.manager.journal(self.name)}"
            raise VerificationError(f"unit {self.name}: {error.message}", remedy) from error
        return len(questions)


def unit_from_options(name: str, host: str, port: int) -> Unit:
    """The unit that this user asks for; UsageError for a name that systemd would not take, or a wrong address."""
    if not NAME.fullmatch(name):
        raise UsageError(f"--service {name!r} is not a name of a unit", "use letters, digits, _, . and -")
    if not 0 < port < 1 << 16:
        raise UsageError(f"--port {port} is not a port", "use 1 to 65535")
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise UsageError(f"--host {host!r} is not an IP address", "use 0.0.0.0 to let others in") from error
    if "%" in host:
        # It may be any text, which systemd would expand and split.
        raise UsageError(f"--host {host!r} has a zone", "use :: to let others in")
    if shutil.which("systemctl") is None:
        raise IncompatibleError("this system has no systemctl", "install without --service")
    return Unit(name, port, os.geteuid() != 0, host)


def installed(prefix: Path, say: Say) -> Unit | None:
    """The unit of this prefix; None if it has none, or if its settings are damaged; a warning is printed."""
    path = prefix / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        say(f"{path} is damaged, so the unit is left as it is ({error}); name it with --service NAME to run it again")
        return None


def of_prefix(prefix: Path, say: Say) -> list[Unit]:
    """The unit to remove with this prefix; if its settings are damaged, those that an install into it wrote."""
    damage: list[str] = []
    unit = installed(prefix, damage.append)
    if not damage:
        return [] if unit is None else [unit]
    found = names_by_files(prefix, prefix / SETTINGS_NAME, "service", say)
    return [Unit(name, PORT, os.geteuid() != 0) for name in found]


def remember(prefix: Path, unit: Unit | None) -> None:
    """Store the settings of the unit; None if there is none any more."""
    if unit is None:
        (prefix / SETTINGS_NAME).unlink(missing_ok=True)
        return
    write_text(prefix / SETTINGS_NAME, json.dumps(asdict(unit), sort_keys=True) + "\n")


def _parse(text: str) -> Unit:
    """The unit in the text of service.json; ValueError, TypeError or AttributeError if it is damaged."""
    unit = dataclass_of(Unit, json.loads(text))
    if not NAME.fullmatch(unit.name):
        raise ValueError(f"name is {unit.name!r}")
    ipaddress.ip_address(unit.host)
    return unit


def owner_line(prefix: Path) -> str:
    """The first line of a unit of this prefix."""
    return _OWNER.format(prefix=prefix.absolute())


def is_of(path: Path, prefix: Path) -> bool:
    """Whether an install into `prefix` wrote this file of a unit."""
    if not path.is_file():
        return False
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    start = _OWNER.format(prefix="")
    # A home folder may be a link.
    return first.startswith(start) and Path(first.removeprefix(start)).resolve() == prefix.resolve()


def names_by_files(prefix: Path, damaged: Path, kind: Literal["service", "timer"], say: Say) -> list[str]:
    """The names of the units that an install into `prefix` by this account wrote, for which settings are `damaged`."""
    files = [path for path in sorted(Manager(os.geteuid() != 0).folder.glob(f"*.{kind}")) if is_of(path, prefix)]
    # The service that a timer starts is removed with it.
    names = [path.stem for path in files if kind == "timer" or not path.with_suffix(".timer").exists()]
    what = "timers" if kind == "timer" else "units"
    say(f"{damaged} is damaged; the {what} of {prefix} are found by their files: {', '.join(names) or 'none'}")
    return names


def _protect_home(prefix: Path) -> str:
    is_at_home = any(prefix.resolve().is_relative_to(home) for home in ("/home", "/root", "/run/user"))
    return "read-only" if is_at_home else "yes"


def require_prefix(prefix: Path) -> None:
    """UsageError for a prefix with a character that systemd refuses in the path of a program, also if it is escaped."""
    wrong = _NOT_IN_PROGRAMS.search(str(prefix.absolute()))
    if wrong is not None:
        message = f"--prefix {str(prefix)!r} has {wrong.group()!r}, which no program of a systemd unit may have"
        raise UsageError(message, "choose another --prefix")


def escaped(path: Path) -> str:
    """A path as the value of a setting or as a program: systemd expands %, and splits at spaces."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def as_argument(path: Path) -> str:
    """A path as an argument of a program, where systemd expands $ too."""
    return escaped(path).replace("$", "$$")
