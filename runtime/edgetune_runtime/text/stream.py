"""Decode the bytes of tokens to text: joins UTF-8 characters across tokens and stops at stop texts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of one answer into text that is safe to show: text that may start a stop text is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Add bytes; returns the text that is now safe to show. Sets `stopped` at a stop text."""
        return self._release(self._decoder.decode(data), final=False)

    def finish(self) -> str:
        """The text that was held back, after the last bytes."""
        return "" if self.stopped else self._release(self._decoder.decode(b"", True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        held = self._held + text
        positions = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if positions:
            self.stopped = True
            self._held = ""
            return held[: min(positions)]
        keep = 0 if final else partial_length(held, self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def partial_length(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is the start of a stop text."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
