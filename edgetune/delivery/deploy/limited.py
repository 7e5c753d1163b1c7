"""A child process with limits on its time and on what it prints, which may come from a hostile board."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

MOST_BYTES = 10**6
_CHUNK_BYTES = 1 << 16
_LOOK_EVERY_S = 0.2
_STALLED_S, _TRANSFER_S = 1800.0, 86_400.0
"""Time to take each part of the input, and all of it."""
_REST_S = 5.0
"""Time to read output that is still in the pipes when the process ends."""


class LimitedProcess:
    """A program that is killed when it prints more than MOST_BYTES on one of its outputs, or takes too long.

    `limit_s` are the seconds that it may take to end after it took the last of its input. It may not take half an hour
    for a part of that, and not a day for all.
    """

    def __init__(self, words: Sequence[str], limit_s: float) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
        self.exceeded = ""
        """The limit that it was killed for exceeding, as a phrase; or nothing."""
        self._limit_s = limit_s
        self._allow(limit_s, "did not end in")
        self._transfer_end = time.monotonic() + _TRANSFER_S
        self._printed = threading.Condition()
        self._is_closed = False
        self._ended = threading.Event()
        self._out, self._problems = bytearray(), bytearray()
        streams = ((self._process.stdout, self._out), (self._process.stderr, self._problems))
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        for thread in (*self._readers, threading.Thread(target=self._watch, daemon=True)):
            thread.start()

    def write(self, data: bytes) -> None:
        """Give it input; BrokenPipeError if it takes no more."""
        stream = self._process.stdin
        assert stream is not None
        if time.monotonic() > self._transfer_end:
            self._exceed(f"did not take its input in {_TRANSFER_S:.0f} s")
        self._allow(min(self._limit_s, _STALLED_S), "did not take a part of its input in")
        stream.write(data)
        stream.flush()
        self._allow(self._limit_s, "did not end in")

    def wait_for(self, start: bytes) -> bytes | None:
        """Wait until it prints a line with this start; the rest of the line, or None if it ends without one."""
        with self._printed:
            self._printed.wait_for(lambda: self._line(start) is not None or self._is_closed or self.exceeded)
            return self._line(start)

    def finish(self) -> tuple[int, bytes, bytes]:
        """End its input and wait for its end: the exit code, and what it printed on both outputs."""
        self._allow(self._limit_s, "did not end in")
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        code = self._process.wait()
        self._ended.set()
        for thread in self._readers:
            # The process of a shared connection keeps the outputs of one that was killed open.
            thread.join(_REST_S if code >= 0 else 0)
        return code, bytes(self._out), bytes(self._problems)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.finish()

    def _allow(self, seconds: float, problem: str) -> None:
        self._deadline, self._late = time.monotonic() + seconds, f"{problem} {seconds:.0f} s"

    def _line(self, start: bytes) -> bytes | None:
        lines = bytes(self._out).split(b"\n")[:-1]
        return next((line.removeprefix(start) for line in lines if line.startswith(start)), None)

    def _read(self, stream: IO[bytes], printed: bytearray) -> None:
        while data := stream.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]
            with self._printed:
                printed += data[: MOST_BYTES - len(printed)]
                self._printed.notify_all()
            if len(printed) >= MOST_BYTES:
                self._exceed(f"printed more than {MOST_BYTES // 10**6} MB")
                break
        stream.close()
        with self._printed:
            self._is_closed = True
            self._printed.notify_all()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            if time.monotonic() > self._deadline:
                self._exceed(self._late)
                return

    def _exceed(self, problem: str) -> None:
        # Before its end, which others wait for.
        with self._printed:
            self.exceeded = self.exceeded or problem
            self._printed.notify_all()
        self._process.kill()
