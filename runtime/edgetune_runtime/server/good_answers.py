"""Reports the good answers of a version that is not acknowledged yet, for the next start of the server."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from edgetune_runtime.store import acknowledgement
from edgetune_runtime.store.acknowledgement import RunReport


class GoodAnswers:
    """Counts the answers of one run of the version that `bundle` belongs to; of an acknowledged one, nothing.

    Each report is a write to the disk, and there are as many as the version needs answers, and one at the end.
    """

    def __init__(self, bundle: Path) -> None:
        version = bundle.resolve().parent
        pending = acknowledgement.read(version.parent.parent)
        self._version, self._count, self._lock = version.name, 0, threading.Lock()
        self._needed = pending.answers_needed if pending is not None and pending.version == version.name else 0

    async def add(self) -> None:
        """Count an answer."""
        if self._count < self._needed:
            await asyncio.to_thread(self._add)

    def _add(self) -> None:
        with self._lock:
            if self._count < self._needed:
                self._count += 1
                acknowledgement.write_report(RunReport(self._version, self._count))

    def end(self) -> None:
        """Report that the run ended cleanly."""
        if self._needed:
            acknowledgement.write_report(RunReport(self._version, self._count, has_ended=True))
