"""Facts of a board, asked before anything is sent to it: processor, memory, Python and earlier deploys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from edgetune_devices import boards
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.store import versions
from edgetune_runtime.store.kit import ID
from edgetune_runtime.store.service import SETTINGS_NAME

from edgetune.delivery.kit.target_python import target_python
from edgetune.delivery.wheel.platforms import OLDEST_PYTHON, PLATFORMS

from .ssh import Connection

# Read by sh on its standard input: a login shell of another kind would not understand it.
_SCRIPT = """\
name={name}
prefix={prefix}
test -n "$prefix" || if test "$(id -u)" = 0; then prefix={root}/$name; else
    prefix=${{XDG_DATA_HOME:-$HOME/{user}}}/edgetune/$name; fi
printf 'prefix=%s\\n' "$prefix"
echo "machine=$(uname -m)"
echo "bits=$(getconf LONG_BIT)"
echo "memory=$(grep MemTotal: /proc/meminfo)"
echo "model=$(tr -d '\\000' 2>/dev/null </proc/device-tree/model)"
echo "python=$(python3 -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)"
echo "current=$(readlink "$prefix/{current}")"
echo "unit=$(test -f "$prefix/{settings}" && echo yes)"
"""
_FORMS = {
    "prefix": r"/.{1,1000}",
    "machine": r"\w{1,30}",
    "bits": r"\d{1,3}",
    "memory": r"MemTotal:\s{1,40}\d{1,12} kB",
    "model": r".{0,200}",
    "python": r"(\d{1,2}\.\d{1,3})?",
    "current": rf"({versions.FOLDER}/{ID.pattern})?",
    "unit": r"(yes)?",
}
"""The forms of a board's answers; a hostile one may print anything."""
_X86_BOARD = "laptop"
_KEPT_SHARE = 0.75
"""Least share of its memory that a board reports: a Pi 4 with 1,024 MiB reports 909, less with a display."""


@dataclass(frozen=True)
class BoardFacts:
    """Facts of a board; `current` is the version that runs there, `has_unit` whether a unit serves it.

    `ram_mib` is the memory that the system reports, without what firmware and kernel keep.
    """

    prefix: str
    machine: str
    ram_mib: int
    model: str
    python: str
    current: str | None
    has_unit: bool

    def board_name(self, requested: str | None) -> str:
        """The board whose kit this one gets: `requested`, or the one that its model names, in the size of its memory.

        `requested` is kept if it is a board file, or if this board has as much memory or more. UsageError if the model
        is not known, IncompatibleError if `requested` has another processor, or if this board has less memory than any
        size of the board.
        """
        named = self._named_by_model() if requested is None else requested
        board = boards.find(named)
        machine = target_python(board, self.python).machine
        if machine != self.machine:
            message = f"the board is {self.machine}, and --board {board.name} is {machine}"
            raise IncompatibleError(message, "choose another --board, or leave it out")
        is_file = board.name != named
        # A laptop is taken for any PC, whatever its memory.
        if is_file or not (board.ram_sizes_mib or board.model_pattern):
            return named
        sizes = [board.ram_mib]
        if board.ram_sizes_mib and board.name == board.family:
            sizes = [size for size in board.ram_sizes_mib if requested is None or size <= board.ram_mib]
        ram_mib = max((size for size in sizes if self.ram_mib >= size * _KEPT_SHARE), default=None)
        if ram_mib is None:
            message = f"the board has {self.ram_mib} MiB of memory, and {board.name} has {min(sizes)} MiB or more"
            raise IncompatibleError(message, "give a similar board of this size with --board")
        return board.name if ram_mib == board.ram_mib else f"{board.family}-{ram_mib // 1024}gb"

    def _named_by_model(self) -> str:
        linux = [board for board in map(boards.load, boards.names()) if board.system == "linux"]
        for board in linux:
            if board.model_pattern and re.search(board.model_pattern, self.model):
                return board.name
        if self.machine == "x86_64":
            return _X86_BOARD
        message = f"the board's model {self.model!r} is not known" if self.model else "the board names no model"
        raise UsageError(message, f"give a similar one with --board: {', '.join(board.name for board in linux)}")


def probe(connection: Connection, name: str, prefix: str | None) -> BoardFacts:
    """Ask a board for its facts; `prefix` is the folder there, by default the kit's for a bundle called `name`.

    IncompatibleError for a 32-bit system, another processor, and a Python that is missing or too old.
    """
    script = _SCRIPT.format(
        prefix=shlex.quote(prefix or ""),
        name=shlex.quote(name),
        root=versions.ROOT_FOLDER,
        user=versions.USER_FOLDER,
        current=versions.CURRENT,
        settings=SETTINGS_NAME,
    )
    text = connection.run(["sh", "-s"], [script.encode()])
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    _check(connection, facts)
    return BoardFacts(
        prefix=facts["prefix"],
        machine=facts["machine"],
        ram_mib=int(facts["memory"].split()[1]) // 1024,
        model=facts["model"],
        python=facts["python"],
        current=facts["current"].rpartition("/")[2] or None,
        has_unit=facts["unit"] == "yes",
    )


def _check(connection: Connection, facts: Mapping[str, str]) -> None:
    where = str(connection.target)
    missing = [key for key, form in _FORMS.items() if not re.fullmatch(form, facts.get(key, "\n"))]
    if missing:
        message = f"{where}: the board did not say its {', '.join(missing)}"
        raise IncompatibleError(message, "deploy needs Linux with sh, getconf and python3")
    if f"linux-{facts['machine']}" not in PLATFORMS or facts["bits"] == "32":
        message = f"{where}: the system is {facts['bits']}-bit on {facts['machine']}"
        raise IncompatibleError(message, "install a 64-bit system (Raspberry Pi OS 64-bit) on a 64-bit board")
    oldest = ".".join(map(str, OLDEST_PYTHON))
    remedy = f"install {oldest} or newer, with Debian 12 or later: apt install python3 python3-venv"
    if not facts["python"]:
        raise IncompatibleError(f"{where}: the board has no python3", remedy)
    if tuple(map(int, facts["python"].split("."))) < OLDEST_PYTHON:
        raise IncompatibleError(f"{where}: the board has Python {facts['python']}", remedy)
