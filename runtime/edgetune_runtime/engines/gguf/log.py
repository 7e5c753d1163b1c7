"""Pass the log of llama.cpp to `logging`, in whole lines."""

from __future__ import annotations

import logging
from collections import deque

LOG = logging.getLogger("edgetune_runtime.llama_cpp")

_DEBUG, _INFORMATION, _ERROR, _CONTINUED = 1, 2, 4, 5
# Levels of ggml.h. llama.cpp logs a hundred info lines per model, so they become debug messages.
_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_EXPECTED = (
    # For each tensor of an adapter when the base is repacked.
    "cannot use buft 'CPU_REPACK', fallback to CPU",
    # For a model with slots, whose last layer of the KV cache is smaller.
    "FA is not enabled - padding V cache to",
)


class LlamaLog:
    """Sends llama.cpp's messages to the logger `edgetune_runtime.llama_cpp`, and keeps the last errors.

    Debug messages are dropped: there are thousands per model and two per adapter switch, where checking the level of
    the logger would cost 0.2 of 1.6 µs. `stopping` has the steps that were asked to stop: llama.cpp logs their end as
    an error.
    """

    def __init__(self) -> None:
        self.stopping: set[int] = set()
        self._errors: deque[str] = deque(maxlen=3)
        self._level = _DEBUG
        self._line = ""

    def write(self, level: int, text: bytes, _: object = None) -> None:
        """Log a message, which may be part of a line; a continuation has the level of the message before."""
        if level == _DEBUG or (level == _INFORMATION and not LOG.isEnabledFor(logging.DEBUG)):
            if self._line:
                self._end_line()
            self._level = _DEBUG
            return
        if level != _CONTINUED:
            self._end_line()
            self._level = level
        if self._level == _DEBUG:
            return
        *whole, self._line = (self._line + text.decode("utf-8", "replace")).split("\n")
        for line in whole:
            self._emit(line)

    def take_errors(self) -> str:
        """The errors logged since the last call, in one line; empty if there were none."""
        self._end_line()
        lines = [line for line in self._errors if line]
        self._errors.clear()
        return " / ".join(lines)

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if line:
            self._emit(line)

    def _emit(self, line: str) -> None:
        line = line.strip()
        if self._level == _ERROR:
            self._errors.append(line)
        if line:
            is_expected = bool(self.stopping) or any(text in line for text in _EXPECTED)
            LOG.log(logging.DEBUG if is_expected else _LEVELS.get(self._level, logging.DEBUG), "%s", line)
