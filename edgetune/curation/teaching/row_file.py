"""The file that new rows are added to: by one process at a time, and one whole line at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path

from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.json_text import json_or_none


@contextmanager
def adding_to(out: Path) -> Iterator[Callable[[str], None]]:
    """Yield what adds a text to the file `out`, whole or not at all. Drops a last line that a kill left half-written.

    UsageError if another process adds rows to the file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileIO(out, "a") as file:
        if out.is_file():
            _lock(file, out)
            text = out.read_bytes()
            last = text.rpartition(b"\n")[2]
            is_cut = last.startswith(b"{") and not last.rstrip(b" \t\r,").endswith(b"}")
            if is_cut and json_or_none(last.decode(errors="replace")) is None:
                file.truncate(len(text) - len(last))
        yield partial(_add, file, out)


def _lock(file: FileIO, out: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl  # noqa: PLC0415 - Windows has none

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"another process is using {out}"
        raise UsageError(message, "wait until it has ended, or give another --out") from error


def _add(file: FileIO, out: Path, text: str) -> None:
    size, rest = os.fstat(file.fileno()).st_size, text.encode()
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        file.truncate(size)
        error.filename = str(out)
        raise
