"""Jobs in, contexts out: which of the contexts of one loaded base runs a job; more are made while all are in use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import BusyError, UsageError
from edgetune_runtime.states.cache import SavedState

from .context import Context, PromptJob
from .turns import LOOK_S

_LOG = logging.getLogger(__name__)


class Pool:
    """Contexts of one base, at most `limit`, made when all there are are in use.

    At most `waiting` calls wait for one; the next is a BusyError.
    """

    def __init__(self, first: Context, *, limit: int = 1, waiting: int = 0) -> None:
        self.first = first
        self._contexts = [first]
        self._limit = limit
        self._most_waiting = waiting
        self._waiting = 0
        self._vocabulary = threading.Lock()

    @property
    def contexts(self) -> list[Context]:
        """All contexts that there are by now."""
        return list(self._contexts)

    @contextmanager
    def lease(self, job: PromptJob) -> Iterator[Context]:
        """The free context that knows most of the job; waits for one, in which `job.check` may end the work.

        UsageError when this very thread's streams are what it would wait for; BusyError when too many wait already.
        """
        gate = self.first.shared.turns.gate
        with gate:
            context = self._take(job)
            if context is None:
                if self._waiting >= self._most_waiting:
                    message = f"{self._waiting} calls wait for one of {len(self._contexts)} contexts"
                    raise BusyError(message, "try again later, or open the bundle with more contexts or waiting calls")
                self._waiting += 1
                try:
                    while context is None:
                        gate.wait(LOOK_S)
                        job.check()
                        context = self._take(job)
                finally:
                    self._waiting -= 1
        with context.held():
            yield context

    @contextmanager
    def tokenizer(self) -> Iterator[Tokenizer]:
        """The base's tokenizer, which no other thread frees meanwhile; UsageError once the pool is closed."""
        with self._vocabulary:
            self.first.check_open()
            yield self.first.engine.tokenizer

    def saved(self, owner: str) -> SavedState | None:
        """The last state of an owner's sequence, live or kept."""
        for context in self._contexts:
            if context.owner == owner:
                with context.hold():
                    return context.saved()
        return self.first.shared.cache.last(owner)

    def identity_of(self, saved: SavedState) -> str:
        """A digest of all that shapes a state, engine and files included."""
        return self.first.identity_of(saved)

    def keep(self, saved: SavedState, owner: str) -> None:
        """Keep a state as an owner's."""
        self.first.shared.cache.put(saved, owner)

    def forget(self, owner: str) -> None:
        """Forget what belongs to an owner, live or kept."""
        self.first.shared.cache.forget(owner)
        for context in self._contexts:
            if context.owner == owner:
                with context.hold():
                    context.reset()

    def close(self) -> None:
        """Close all contexts, the first one last, as the others run on its base."""
        for context in reversed(self._contexts[1:]):
            context.close()
        with self._vocabulary:
            self.first.close()
        if self.first.shared.thread is not None:
            self.first.shared.thread.close()

    def _take(self, job: PromptJob) -> Context | None:
        """Mark a free context as this thread's, making one where there may be more; inside the gate."""
        free = [context for context in self._contexts if context.holder is None]
        if not free:
            if len(self._contexts) < self._limit:
                free = [self.first.fork()]
                self._contexts += free
                _LOG.debug("made context %d of at most %d", len(self._contexts), self._limit)
            elif all(context.holder == threading.get_ident() for context in self._contexts):
                raise UsageError("a stream of this thread is still open", "read it to its end or close it first")
            else:
                return None
        context = max(free, key=lambda context: context.known(job))
        context.holder = threading.get_ident()
        return context
