"""Deploys a bundle to one board: sends what the board lacks, and has the board's own program install it.

The board switches to the new version by itself, when its answers are right, and back when its unit does not answer. So
a connection that is lost at any point leaves the old version, or the new one, running.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from edgetune_runtime.bundle import entry_of
from edgetune_runtime.errors import EdgetuneError, NotFoundError, UsageError
from edgetune_runtime.store import files
from edgetune_runtime.store.kit import KIT_NAME, PROGRAM_NAME, SUMS_NAME, KitFile
from edgetune_runtime.store.versions import CURRENT
from edgetune_runtime.update.state import ROOT_NAME

from edgetune.common.progress import Progress
from edgetune.delivery.board.transfer import LACKING
from edgetune.delivery.board.uninstall import INCOMING
from edgetune.delivery.board.updates import Repository
from edgetune.delivery.kit import output
from edgetune.delivery.kit.make import AssembledKit

from . import replies
from .probe import BoardFacts, probe
from .ssh import SHORT_S, Connection
from .target import Target

T = TypeVar("T")
Assemble = Callable[[str, str], AssembledKit]
"""Makes the kit of a bundle for a board and a Python version, such as 3.13."""

_MB = 10**6
_CHUNK_BYTES = 1 << 18
_LONG_S = 14_400.0
"""More than the board program itself waits for packages, golden answers and a unit that computes its states."""
# Read by sh, whatever the login shell is. Each sender has its own unfinished file.
# What root sends must be readable for the unit's account, whatever root's umask is.
_PUT = (
    '[ "$(id -u)" != 0 ] || umask 022; '
    'mkdir -p "${1%/*}" && cat > "$1.$$.part" && chmod 444 "$1.$$.part" && mv -f "$1.$$.part" "$1"'
)


@dataclass(frozen=True)
class Where:
    """The name of the bundle, and where it is installed: `prefix` is None for the default of the board's user."""

    name: str
    prefix: str | None = None


@dataclass(frozen=True)
class UnitOptions:
    """The unit to run: its name, and the address and port that it listens on, None for those it has or the defaults."""

    name: str
    listen: str | None = None
    port: int | None = None

    def words(self) -> list[str]:
        """The options of the board program."""
        listen = [] if self.listen is None else ["--host", self.listen]
        port = [] if self.port is None else ["--port", str(self.port)]
        return ["--service", self.name, *listen, *port]


@dataclass(frozen=True)
class DeployOptions:
    """`board` is None to go by the board's own model, `unit` and `repository` to leave its unit and its timer as they
    are; a timer asks the repository once a day.

    An install waits until the unit answers, if there is one; with `waits_healthy` there must be one.
    """

    board: str | None = None
    unit: UnitOptions | None = None
    repository: Repository | None = None
    waits_healthy: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an action did on one board; its text is one line."""

    target: Target

    def to_json(self) -> dict[str, Any]:
        """The board and the figures as JSON values."""
        return {"host": str(self.target)} | {name: value for name, value in vars(self).items() if name != "target"}


@dataclass(frozen=True)
class Deployed(Outcome):
    """What a deploy did, and what the user should know of its unit."""

    version: str
    changed: bool
    sent_bytes: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        state = "is the current one" if self.changed else "was there already"
        return "; ".join([f"{self.target}: version {self.version} {state}, {self._sent()}", *self.warnings])

    def _sent(self) -> str:
        return f"{self.sent_bytes / _MB:.1f} MB sent in {self.seconds:.1f} s" if self.sent_bytes else "nothing sent"


@dataclass(frozen=True)
class RolledBack(Outcome):
    """The version that a board went back to."""

    version: str

    def __str__(self) -> str:
        return f"{self.target}: version {self.version} is the current one again"


@dataclass(frozen=True)
class Versions(Outcome):
    """The versions on a board: `version`, `state` (current, previous or empty), `bundle`, `engines` of each."""

    versions: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        versions = (f"{item['version']} {item['state']}".rstrip() for item in self.versions)
        return f"{self.target}: {', '.join(versions)}"


class _Program:
    """The board program, started on the board."""

    def __init__(self, connection: Connection, path: str, prefix: str) -> None:
        self.connection = connection
        self.path, self.prefix = path, prefix

    def command(self, name: str, *words: str) -> list[str]:
        return ["python3", "-I", self.path, name, *words, "--prefix", self.prefix]

    def ask(self, name: str, *words: str, parse: Callable[[Any], T], limit_s: float = SHORT_S) -> T:
        """The JSON that a command prints in its last line, checked; a login shell may print others before."""
        return self.parsed(self.connection.run([*self.command(name, *words), "--json"], limit_s=limit_s), parse)

    def parsed(self, text: str, parse: Callable[[Any], T]) -> T:
        """The JSON in the last line of an output, checked; EdgetuneError if it is of another form."""
        line = text.rpartition("\n")[2]
        try:
            return parse(json.loads(line))
        except (ValueError, RecursionError) as error:
            message = f"{self.connection.target}: the board program answered {line[:80]!r}"
            raise EdgetuneError(message, "see what its login shell prints") from error


def deploy(target: Target, where: Where, assemble: Assemble, options: DeployOptions, progress: Progress) -> Deployed:
    """Make a bundle the current version on a board.

    Raises UnreachableError when the board cannot be reached or the connection is lost, IncompatibleError when the board
    cannot run the kit, BusyError while another deploy is at work, OutOfSpaceError when its disk is full, and
    VerificationError when a file or an answer is wrong; and what `assemble` raises. The previous version runs on, and
    the next deploy resumes.
    """
    with Connection(target) as connection:
        progress.say(f"{target}: checking the board")
        facts = probe(connection, where.name, where.prefix)
        if options.waits_healthy and options.unit is None and not facts.has_unit:
            raise NotFoundError(f"{target}: no unit is installed in {facts.prefix}", "add --service NAME")
        board = facts.board_name(options.board)
        progress.say(f"{target}: {facts.ram_mib} MiB of memory, so the kit is the one for {board}")
        assembled = assemble(board, facts.python)
        program = _send_program(connection, facts, assembled)
        sending = _Sending(program, assembled, progress)
        incoming = f"{facts.prefix}/{INCOMING}"
        sent = sum(_put(connection, assembled.contents[name], f"{incoming}/{name}") for name in (KIT_NAME, SUMS_NAME))
        words = ["--receive", assembled.kit.version, *([] if options.unit is None else options.unit.words()), "--json"]
        if options.repository is not None:
            root = f"{incoming}/{ROOT_NAME}"
            sent += _put(connection, options.repository.root, root)
            words += ["--updates", options.repository.url, "--root", root]
        command = program.command("install", incoming, *words)
        text = connection.converse(command, LACKING, sending.files, limit_s=_LONG_S)
        _, changed, warnings = program.parsed(text, replies.installed)
        sent += sending.sent_bytes
        return Deployed(target, assembled.kit.version, changed, sent, round(sending.seconds, 3), warnings)


def roll_back(target: Target, where: Where) -> RolledBack:
    """Switch a board back to the previous version; NotFoundError if there is none."""
    with Connection(target) as connection:
        return RolledBack(target, _installed(connection, where).ask("rollback", parse=replies.version, limit_s=_LONG_S))


def list_versions(target: Target, where: Where) -> Versions:
    """The versions on a board; NotFoundError if the bundle is not installed there."""
    with Connection(target) as connection:
        return Versions(target, _installed(connection, where).ask("list", parse=replies.versions))


def _installed(connection: Connection, where: Where) -> _Program:
    facts = probe(connection, where.name, where.prefix)
    if facts.current is None:
        message = f"{connection.target}: {where.name} is not installed in {facts.prefix}"
        raise NotFoundError(message, "deploy it first, or give its --prefix")
    return _Program(connection, f"{facts.prefix}/{CURRENT}/{PROGRAM_NAME}", facts.prefix)


def _send_program(connection: Connection, facts: BoardFacts, assembled: AssembledKit) -> _Program:
    """Put the board program into the store by its digest, where it is never written to again."""
    path = f"{facts.prefix}/{files.FOLDER}/{assembled.program.sha256}"
    try:
        _put(connection, assembled.contents[PROGRAM_NAME], path)
    except EdgetuneError as error:
        if type(error) is not EdgetuneError:
            raise
        raise UsageError(error.message, "choose another --prefix, or free some space") from error
    return _Program(connection, path, facts.prefix)


def _put(connection: Connection, source: Path | bytes, remote: str) -> int:
    """Send a small file unless it is there already; the number of bytes sent."""
    digest = connection.run(["sh", "-c", 'sha256sum < "$1" 2>/dev/null; true', "sh", remote])
    entry = entry_of(source)
    if entry.sha256 in digest:
        return 0
    with output.opened(source) as file:
        connection.run(["sh", "-c", _PUT, "sh", remote], file)
    return entry.bytes


class _Sending:
    """Sends the files of a kit that a board lacks; `sent_bytes` and `seconds` are those of the transfer."""

    def __init__(self, program: _Program, assembled: AssembledKit, progress: Progress) -> None:
        self._program, self._assembled, self._progress = program, assembled, progress
        self._target = program.connection.target
        self.sent_bytes, self.seconds = 0, 0.0

    def files(self, lacking: str) -> Iterator[bytes]:
        """The rest of each file, in the order of the board's list."""
        kit = self._assembled.kit
        files = {file.sha256: file for file in kit.files}
        sizes = {digest: file.bytes for digest, file in files.items()}
        offsets = self._program.parsed(lacking, partial(replies.missing, sizes=sizes))
        total = sum(sizes[digest] - offset for digest, offset in offsets.items())
        begin = time.monotonic()
        if offsets:
            with self._progress.step(f"{self._target}: sending MB", max(1, round(total / _MB))) as step:
                for digest, offset in offsets.items():
                    for data in self._rest_of(files[digest], offset):
                        yield data
                        self.sent_bytes += len(data)
                        self.seconds = time.monotonic() - begin
                        rate = self.sent_bytes / _MB / max(self.seconds, 1e-3)
                        step.update(f"{rate:.1f} MB/s, {files[digest].name}", self.sent_bytes // _MB)
        is_first = any(file.sha256 in offsets for file in kit.wheel_files)
        packages = " and its packages, which takes minutes on a small board" if is_first else ""
        self._progress.say(f"{self._target}: installing version {kit.version}{packages}")

    def _rest_of(self, file: KitFile, offset: int) -> Iterator[bytes]:
        with output.opened(self._assembled.contents[file.path]) as source:
            source.seek(offset)
            while data := source.read(_CHUNK_BYTES):
                yield data
