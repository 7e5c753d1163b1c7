"""Takes over the bundle on disk in a server: each version that the bundle's path is switched to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

from edgetune_runtime.bundle import pinned
from edgetune_runtime.bundle.parts import identity_in
from edgetune_runtime.errors import EdgetuneError, error_to_report

from .adapter_changes import AdapterChanges
from .asynchronous import AsyncRuntime
from .measuring import loaded_bundle

_LOG = logging.getLogger(__name__)
_WATCH_S = 1.0


class FollowedBundle:
    """The bundle of a runtime: the `folder` that was looked at last, and the `digest` of the one in use, its
    `identity`.

    A warning in the log says what is wrong with an adapter, or with the bundle, which then stays as it is.
    """

    def __init__(self, runtime: AsyncRuntime) -> None:
        self._runtime = runtime
        # Not where the path leads now: it may have been switched while the bundle was opened.
        self.folder = loaded_bundle(runtime.runtime).folder
        self.digest = identity_in(self.folder)
        self._is_asked = asyncio.Event()

    async def reload(self) -> AdapterChanges | None:
        """Take over the bundle on disk; None if that is not possible."""
        bundle = self._runtime.runtime.bundle
        self.folder = pinned(bundle)
        try:
            digest = identity_in(self.folder)
            changes = await self._runtime.reload()
        except (EdgetuneError, OSError) as error:
            reported = error_to_report(error, unexpected="check the disk that has the bundle")
            _LOG.warning("cannot reload the adapters of %s: %s", bundle, reported)
            return None
        if not changes.refused:
            self.digest = digest
        for name, reason in changes.refused.items():
            _LOG.warning("did not load adapter %r: %s", name, reason)
        counts = (len(changes.added), len(changes.replaced), len(changes.removed))
        _LOG.info("reloaded the adapters: %d added, %d replaced, %d removed", *counts)
        return changes

    async def watch(self, reload: Callable[[], Awaitable[object]]) -> None:
        """Await `reload` at each version that the bundle's path is switched to, and when `ask` asks for it.

        Runs until it is cancelled.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._is_asked.wait()
            if self._is_asked.is_set() or pinned(self._runtime.runtime.bundle) != self.folder:
                self._is_asked.clear()
                try:
                    await reload()
                except Exception:
                    _LOG.exception("cannot reload the bundle")

    def ask(self) -> None:
        """Have `watch` reload the bundle. In the thread of its event loop."""
        self._is_asked.set()


def reload_signal() -> signal.Signals | None:
    """The signal at which servers reload their bundle, SIGHUP; None on Windows, and if standard input is a terminal,
    whose end is such a signal too.
    """
    return None if os.isatty(0) else getattr(signal, "SIGHUP", None)
