"""Lines of log messages: a few of each kind per second, without control characters of what others sent."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

_LONGEST, _LONGEST_TRACEBACK = 2000, 20_000
"""Characters."""
_MAX = 5
_WINDOW_S = 10.0


class LineFormatter(logging.Formatter):
    """Formats a message as one line, after which the lines of a traceback are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line; control characters could write to a terminal, and line breaks could forge other messages."""
        return _printable(super().formatMessage(record)[:_LONGEST])

    def formatException(self, ei: Any) -> str:  # noqa: N802, ANN401 - as logging has it
        """The traceback, whose last lines may be what others sent."""
        lines = super().formatException(ei)[:_LONGEST_TRACEBACK].split("\n")
        return "\n".join(f"  {_printable(line)}" for line in lines)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class RateFilter(logging.Filter):
    """Lets through 5 warnings and errors of each kind per 10 s, and reports how many it left out.

    Clients can cause some of them as often as they like, which would fill a disk. Debug messages are not limited.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begin_s = time.monotonic()
        self._counts: Counter[object] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is written."""
        if record.levelno < logging.WARNING:
            return True
        now_s, kind = time.monotonic(), record.msg if isinstance(record.msg, str) else type(record.msg)
        if now_s > self._begin_s + _WINDOW_S:
            left_out = sum(count - _MAX for count in self._counts.values() if count > _MAX)
            self._begin_s = now_s
            self._counts.clear()
            if left_out:
                record.msg, record.args = f"{record.getMessage()} ({left_out} earlier messages were left out)", ()
        self._counts[kind] += 1
        return self._counts[kind] <= _MAX
