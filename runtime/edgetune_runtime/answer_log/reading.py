"""Reads a log of answers, which may be another's file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.errors import NotFoundError, UsageError, VerificationError
from edgetune_runtime.wording import first_of, printable

from .answers import LoggedAnswer, answer_of, merged
from .log import file_before

_LOG = logging.getLogger(__name__)


def read_answer_log(path: Path, manifest: Manifest, say: Callable[[str], None] = _LOG.warning) -> list[LoggedAnswer]:
    """The answers in a log of this bundle, each with its last correction, in the order of these, or of first lines.

    `say` gets a sentence about lines that are left out because they are not JSON, such as a line that was not written
    to its end, and about those of another bundle or base.

    NotFoundError if there is no log, VerificationError for a line that is not one of a log, UsageError for a folder,
    and if all are of other bundles.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "give the log, a file in it")
    if not path.is_file() and not file_before(path).is_file():
        raise NotFoundError(f"no log {path}", "give the file of `edgetune-run serve --log-answers`")
    entries: dict[str, LoggedAnswer] = {}
    others = list[str]()
    for where, entry in _entries(path, say):
        if (entry.bundle, entry.base) == (manifest.name, manifest.base.fingerprint):
            merged(entries, entry)
        else:
            others.append(f"{where} is of bundle {entry.bundle!r} on base {printable(entry.base[:12])}…")
    if others:
        message = f"{others[0]}, not of {manifest.name!r} on {manifest.base.fingerprint[:12]}…"
        if not entries:
            raise UsageError(message, "give the log of this bundle")
        say(f"left out {len(others)} lines of other bundles: {message}")
    return list(entries.values())


def _entries(path: Path, say: Callable[[str], None]) -> Iterator[tuple[str, LoggedAnswer]]:
    for file, content in _contents(path):
        left_out = list[str]()
        for number, line in enumerate(content.splitlines(), 1):
            where = f"{file}:{number}"
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError):
                left_out += [where] if line.strip() else []
                continue
            try:
                yield where, answer_of(raw)
            except (TypeError, UsageError, RecursionError) as error:
                raise VerificationError(f"{where} is not a line of a log: {error}", "correct or remove it") from error
        if left_out:
            say(f"left out lines that are not JSON, such as cut-off ones: {first_of(left_out)}")


def _contents(path: Path) -> list[tuple[Path, bytes]]:
    """Both files of a log as they were at one moment: a server may rename one to the other meanwhile."""
    before = file_before(path)
    while True:
        state = _state(before)
        with suppress(FileNotFoundError):
            contents = [(file, file.read_bytes()) for file in (before, path) if file.is_file()]
            if _state(before) == state:
                return contents


def _state(path: Path) -> tuple[int, int] | None:
    """What changes if another file takes the place of this one."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
