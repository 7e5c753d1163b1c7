"""What must be known of a board before anything is sent to it: processor, Python and the files of earlier deploys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from edgetune_devices import boards
from edgetune_runtime.errors import IncompatibleError, UsageError

from edgetune.delivery.board.service import SETTINGS_NAME
from edgetune.delivery.kit.platforms import platform_of

from .ssh import Connection

OLDEST_PYTHON = (3, 11)
MACHINES = ("aarch64", "x86_64")
# Read by sh on its standard input: a login shell of another kind would not understand it.
_SCRIPT = """\
name={name}
prefix={prefix}
test -n "$prefix" || if test "$(id -u)" = 0; then prefix=/opt/edgetune/$name; else
    prefix=${{XDG_DATA_HOME:-$HOME/.local/share}}/edgetune/$name; fi
echo "prefix=$prefix"
echo "machine=$(uname -m)"
echo "bits=$(getconf LONG_BIT)"
echo "model=$(tr -d '\\000' 2>/dev/null </proc/device-tree/model)"
echo "python=$(python3 -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)"
echo "current=$(readlink "$prefix/current")"
echo "unit=$(test -f "$prefix/{settings}" && echo yes)"
"""
# The board's own name, as in /proc/device-tree/model, and the board whose kit it gets.
_MODELS = (
    ("Raspberry Pi Zero 2", "pi-zero-2w"),
    ("Raspberry Pi 3", "pi-3b-plus"),
    ("Raspberry Pi (4|Compute Module 4|400)", "pi-4"),
    ("Raspberry Pi (5|Compute Module 5|500)", "pi-5"),
    ("Orange Pi 5", "orange-pi-5"),
    ("ROCK 5|Radxa.* 5", "rock-5"),
    ("Orin Nano", "jetson-orin-nano"),
)
_X86_BOARD = "laptop"


@dataclass(frozen=True)
class BoardFacts:
    """Facts of a board; `current` is the version that runs there, `has_unit` whether a unit serves it."""

    prefix: str
    machine: str
    model: str
    python: str
    current: str | None
    has_unit: bool

    def board_name(self, wanted: str | None) -> str:
        """The board whose kit this one gets: `wanted`, or the one that its model names.

        UsageError if none is known, IncompatibleError if `wanted` has another processor.
        """
        if wanted is not None:
            machine = platform_of(boards.load(wanted), self.python).machine
            if machine != self.machine:
                message = f"the board is {self.machine}, and --board {wanted} is {machine}"
                raise IncompatibleError(message, "choose another --board, or leave it out")
            return wanted
        known = boards.names()
        found = [name for pattern, name in _MODELS if re.search(pattern, self.model) and name in known]
        if found:
            return found[0]
        if self.machine == "x86_64":
            return _X86_BOARD
        message = f"the board's model {self.model!r} is not known" if self.model else "the board names no model"
        raise UsageError(message, f"give a similar one with --board: {', '.join(known)}")


def probe(connection: Connection, name: str, prefix: str | None) -> BoardFacts:
    """Ask a board for its facts; `prefix` is the folder there, by default the kit's for a bundle called `name`.

    IncompatibleError for a 32-bit system, another processor, and a Python that is missing or too old.
    """
    script = _SCRIPT.format(prefix=shlex.quote(prefix or ""), name=shlex.quote(name), settings=SETTINGS_NAME)
    text = connection.run(["sh", "-s"], [script.encode()])
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    _check(connection, facts)
    return BoardFacts(
        prefix=facts["prefix"],
        machine=facts["machine"],
        model=facts["model"],
        python=facts["python"],
        current=facts["current"].rpartition("/")[2] or None,
        has_unit=facts["unit"] == "yes",
    )


def _check(connection: Connection, facts: Mapping[str, str]) -> None:
    where = str(connection.target)
    missing = [key for key in ("prefix", "machine", "bits", "model", "python", "current", "unit") if key not in facts]
    if missing:
        message = f"{where}: the board did not say its {', '.join(missing)}"
        raise IncompatibleError(message, "deploy needs Linux with sh, getconf and python3")
    if facts["machine"] not in MACHINES or facts["bits"] == "32":
        message = f"{where}: the system is {facts['bits']}-bit on {facts['machine']}"
        raise IncompatibleError(message, "install a 64-bit system (Raspberry Pi OS 64-bit) on a 64-bit board")
    oldest = ".".join(map(str, OLDEST_PYTHON))
    remedy = f"install {oldest} or newer, with Debian 12 or later: apt install python3 python3-venv"
    if not facts["python"]:
        raise IncompatibleError(f"{where}: the board has no python3", remedy)
    if tuple(int(part) for part in re.findall(r"\d+", facts["python"])) < OLDEST_PYTHON:
        raise IncompatibleError(f"{where}: the board has Python {facts['python']}", remedy)
