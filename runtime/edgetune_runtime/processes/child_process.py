"""Runs a child process with a time limit, keeps the end of its output, and describes how it ended."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from edgetune_runtime.limits import no_limits
from edgetune_runtime.wording import printable

_MAX_BYTES = 1 << 20
"""Size of the end of each stream that stays in memory: a child may write without end."""
_LINE_CHARACTERS = 300
MAX_S = 3600
"""The longest time that a process confines itself to, such as one that asks a bundle for its golden answers."""
_CHECK_S = 0.05
_FOLDERS = re.compile(r"\S*/(?=[^/\s]+:\d+: )")
"""Folders of the source file that an assertion names, which are those of the machine that compiled it."""
_CLOSING_S = 10.0
"""Time to end for a process that has closed its output."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessResult:
    """How a child ended: its exit code, or minus the number of a signal; killed after `timeout_s`, if not None."""

    code: int
    output: bytes
    errors: bytes
    timeout_s: float | None = None

    @property
    def how(self) -> str:
        """How it ended, as a phrase such as "was ended by SIGABRT"."""
        if self.timeout_s is not None:
            return f"was killed after {self.timeout_s:.0f} s"
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            return f"was ended by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was ended by signal {-self.code}"

    @property
    def last_line(self) -> str:
        """The last line of standard error that is not empty, shortened, without control characters; or nothing."""
        lines = [line for line in self.errors.decode("utf-8", "replace").splitlines() if line.strip()]
        return printable(_FOLDERS.sub("", lines[-1].strip() if lines else ""))[-_LINE_CHARACTERS:]


@cache
def has_python() -> bool:
    """Whether `sys.executable` is a Python: an embedded or frozen one is the app itself. Logs a warning once if not."""
    is_python = Path(sys.executable or "").name.lower().startswith(("python", "pypy"))
    if is_python and not getattr(sys, "frozen", False):
        return True
    _LOG.warning("bundles and schemas are not tried in a child process first: %r is not a Python", sys.executable)
    return False


def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    stdin: bytes = b"",
    check: Callable[[], None] = no_limits,
) -> ProcessResult:
    """Run `command` with `stdin` as its standard input; kills it, and what it started, after `timeout_s`.

    OSError if it cannot be started. Raises what `check` does, which is called meanwhile.
    """
    pipe = subprocess.PIPE
    # Its own session, so that Ctrl-C and a kill of the group reach this process and that one apart.
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    assert child.stdin and child.stdout and child.stderr
    output, errors = bytearray(), bytearray()
    readers = [_reader(child.stdout, output), _reader(child.stderr, errors)]
    timed_out = False
    try:
        with suppress(OSError), child.stdin:
            child.stdin.write(stdin)
        # Waiting for the process itself would poll.
        end_s = time.monotonic() + timeout_s
        while readers[0].is_alive() and time.monotonic() < end_s:
            readers[0].join(_CHECK_S)
            check()
        timed_out = readers[0].is_alive()
        if not timed_out:
            child.wait(_CLOSING_S)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if timed_out or child.returncode is None:
            _kill(child)
    for reader in readers:
        # What the child started may have left the group and still hold the pipe.
        reader.join(_CLOSING_S)
    return ProcessResult(child.returncode, bytes(output), bytes(errors), timeout_s if timed_out else None)


def _reader(stream: IO[bytes], kept: bytearray) -> threading.Thread:
    def read() -> None:
        with stream:
            while block := stream.read1(1 << 16):  # type: ignore[attr-defined]
                kept.extend(block)
                del kept[:-_MAX_BYTES]

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and its group."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()
