"""Bytes of tokens in, text out: joins UTF-8 across tokens, ends at stop texts, holds back what may belong to one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of one answer into text that can be shown at once."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """The text that is certain after these bytes; `stopped` becomes true when it ended at a stop text."""
        return self._release(self._decoder.decode(data), final=False)

    def finish(self) -> str:
        """The text still held back when no more bytes come."""
        return "" if self.stopped else self._release(self._decoder.decode(b"", True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        held = self._held + text
        found = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        keep = 0 if final else self._open_end(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _open_end(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop text begins."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
