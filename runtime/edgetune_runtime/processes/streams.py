"""The standard streams of command-line tools."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import UnsupportedOperation


def prepare_streams() -> None:
    """Give closed standard streams the null device, and replace characters that the encoding of a stream lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 - open until the end
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            # What was read from before, as by an earlier call in this process, can no longer be changed.
            with suppress(UnsupportedOperation):
                stream.reconfigure(errors="replace")


def flush_output() -> None:
    """Flush standard output, and discard what cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes at exit and would report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
