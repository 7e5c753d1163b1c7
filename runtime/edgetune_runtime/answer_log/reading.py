"""Reads a log of answers, which may be another's file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.errors import NotFoundError, UsageError, VerificationError
from edgetune_runtime.wording import first_of, printable

from .answers import LoggedAnswer, answer_of, merged
from .log import file_before

_LOG = logging.getLogger(__name__)


def read_answer_log(path: Path, manifest: Manifest, say: Callable[[str], None] = _LOG.warning) -> list[LoggedAnswer]:
    """The answers in a log of this bundle, each with its last correction, in the order of these, or of first lines.

    `say` gets a sentence about lines that are left out because they are no JSON, as a part of a line that was not
    written to its end.

    NotFoundError if there is no log, VerificationError for a line that is not one of a log, UsageError for one of
    another bundle.
    """
    if not path.is_file():
        raise NotFoundError(f"no log {path}", "give the file of `edgetune-run serve --log-answers`")
    entries: dict[str, LoggedAnswer] = {}
    for where, entry in _entries(path, say):
        if (entry.bundle, entry.base) != (manifest.name, manifest.base.fingerprint):
            base = printable(entry.base[:12])
            message = f"{where} is of bundle {entry.bundle!r} on base {base}…, not of {manifest.name!r}"
            raise UsageError(f"{message} on {manifest.base.fingerprint[:12]}…", "give the log of this bundle")
        merged(entries, entry)
    return list(entries.values())


def _entries(path: Path, say: Callable[[str], None]) -> Iterator[tuple[str, LoggedAnswer]]:
    for file in (file_before(path), path):
        left_out = list[str]()
        for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
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
            say(f"left out what is not JSON, as a part of a line: {first_of(left_out)}")
