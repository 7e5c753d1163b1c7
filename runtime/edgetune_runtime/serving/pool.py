"""A pool of contexts on one loaded base: leases each job the context that has cached most of its prompt."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import BusyError, UsageError
from edgetune_runtime.states.activation import Spans
from edgetune_runtime.states.cache import SavedState

from .context import Context
from .jobs import PromptJob
from .turns import POLL_S

_LOG = logging.getLogger(__name__)


class Pool:
    """Up to `limit` contexts on one base; a new one is created when all others are in use.

    Up to `waiting` calls wait for a free context; the next one raises BusyError.
    """

    def __init__(self, first: Context, *, limit: int = 1, waiting: int = 0) -> None:
        self.first = first
        self._contexts = [first]
        self.limit = limit
        self._most_waiting = waiting
        self._waiting = 0
        self._uses = 0
        self._is_closed = False

    @property
    def contexts(self) -> list[Context]:
        """The contexts created so far."""
        return list(self._contexts)

    @contextmanager
    def lease(self, job: PromptJob) -> Iterator[Context]:
        """Lease the free context with the longest reusable prefix; wait if none is free, until `job.check` raises.

        UsageError when it would wait for streams of this thread; BusyError when too many calls are already waiting.
        """
        gate = self.first.shared.gate
        with gate:
            self._check_open()
            context = self._take(job)
            if context is None:
                if self._waiting >= self._most_waiting:
                    message = f"{self._waiting} calls are already waiting for one of {len(self._contexts)} contexts"
                    raise BusyError(message, "try again later, or open the bundle with more contexts or more waiting")
                self._waiting += 1
                try:
                    while context is None:
                        gate.wait(POLL_S)
                        job.check()
                        self._check_open()
                        context = self._take(job)
                finally:
                    self._waiting -= 1
        with context.held():
            yield context

    @contextmanager
    def tokenizer(self) -> Iterator[Tokenizer]:
        """The base's tokenizer, which `close` frees after the block; UsageError if the pool is closed.

        Any number of threads may use it at the same time.
        """
        gate = self.first.shared.gate
        with gate:
            self._check_open()
            self._uses += 1
        try:
            yield self.first.engine.tokenizer
        finally:
            with gate:
                self._uses -= 1
                gate.notify_all()

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """The number of tokens that fit in a context with these adapters, prompt and answer together."""
        return self.first.capacity(adapters)

    def spans(self, adapters: Mapping[str, float], tokens: Sequence[int]) -> Spans:
        """The adapters that are active in each span of these tokens."""
        return self.first.spans(adapters, tokens)

    def saved(self, owner: str) -> SavedState | None:
        """The last state of an owner, from a context or from the cache; UsageError if the pool is closed."""
        self._check_open()
        states = [context.saved() for context in self._of_owner(owner)]
        return states[0] if states else self.first.shared.cache.last(owner)

    def identity_of(self, saved: SavedState) -> str:
        """A digest of everything that determines a state, including engine and files."""
        return self.first.identity_of(saved)

    def keep(self, saved: SavedState, owner: str) -> None:
        """Cache a state for an owner."""
        self.first.shared.cache.put(saved, owner)

    def load(self, entry: AdapterEntry, path: Path, fingerprint: str) -> None:
        """Check an adapter's file and load it."""
        self.first.engine.load_adapter(entry.name, path, fingerprint, entry.invocation)

    def drop_states(self, owner: str) -> None:
        """Drop the states of an owner, in contexts and in the cache; a closed pool has none."""
        if self._is_closed:
            return
        for context in self._of_owner(owner):
            context.reset()
        # Last, because another call that takes the owner's context puts its state there.
        self.first.shared.cache.drop_states(owner)

    def close(self) -> None:
        """Free everything once no other thread runs a call or uses the tokenizer; a second call does nothing.

        Calls that wait for a context and later ones raise UsageError. An open stream of this thread ends with an error.
        """
        gate, me = self.first.shared.gate, threading.get_ident()
        with gate:
            self._is_closed = True
            gate.notify_all()
            while self._uses or any(context.holder not in (None, me) for context in self._contexts):
                gate.wait()
            # The first one last, because the others use its base.
            for context in reversed(self._contexts):
                context.close()
        if self.first.shared.threads is not None:
            self.first.shared.threads.close()

    def _of_owner(self, owner: str) -> Iterator[Context]:
        """The contexts whose sequence is an owner's, each held while it is looked at."""
        for context in self.contexts:
            if context.owner == owner:
                with context.hold():
                    # A call that held it until now may have made it its own.
                    if context.owner == owner:
                        yield context

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("the runtime is closed", "open the bundle again")

    def _take(self, job: PromptJob) -> Context | None:
        """Give this thread a free context, or a new one if there are fewer than `limit`. Call it inside the gate."""
        free = [context for context in self._contexts if context.holder is None]
        if not free:
            if len(self._contexts) < self.limit:
                free = [self.first.fork()]
                self._contexts += free
                _LOG.debug("created context %d of at most %d", len(self._contexts), self.limit)
            elif all(context.holder == threading.get_ident() for context in self._contexts):
                raise UsageError("a stream of this thread is still open", "read it to its end or close it first")
            else:
                return None
        context = max(free, key=lambda context: context.reusable_tokens(job))
        context.holder = threading.get_ident()
        return context
