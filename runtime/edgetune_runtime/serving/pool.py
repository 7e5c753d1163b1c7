"""A pool of contexts on one loaded base: leases each job the context that has cached most of its prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.states.cache import SavedState
from edgetune_runtime.wording import CLOSED

from .context import Context
from .jobs import PromptJob
from .places import Holder, Patience
from .turns import POLL_S

_LOG = logging.getLogger(__name__)


class Pool:
    """The contexts on one base; a new one is created when all others are in use and `places` allows it.

    Thread-safe.
    """

    def __init__(self, first: Context) -> None:
        self.first = first
        self.places = first.shared.places
        self._contexts = [first]
        self._uses: set[object] = set()
        self._is_closed = False

    @property
    def contexts(self) -> list[Context]:
        """The contexts that there are."""
        return [context for context in self._contexts if not context.closed]

    @contextmanager
    def take(self, job: PromptJob, holder: Holder) -> Iterator[Context]:
        """Lease the free context with the longest reusable prefix to the holder of a place, until `job.check` raises.

        It waits if none is free. Same errors as `Places.enter`: so a thread that has a stream open may wait for the
        streams of others, but not for its own. Any thread may read a stream: its own are those that it read last, and
        that no other thread has read for `PATIENCE_S` since.
        """
        context = None
        try:
            context = self._acquire(job, holder)
            yield context
        finally:
            # Ctrl-C may have come before it was made or returned.
            with self.places.gate:
                self._uses.discard(holder)
            for held in self._contexts if context is None else [context]:
                if held.holder is holder:
                    held.release()

    @contextmanager
    def tokenizer(self) -> Iterator[Tokenizer]:
        """The base's tokenizer, which `close` frees after the block; UsageError if the pool is closed.

        Any number of threads may use it at the same time.
        """
        use = object()
        try:
            with self.places.gate:
                self._check_open()
                self._uses.add(use)
            yield self.first.engine.tokenizer
        finally:
            with self.places.gate:
                self._uses.discard(use)
                self.places.changed.notify_all()

    @contextmanager
    def opened(self) -> Iterator[Pool]:
        """This pool; see `MergedPool.opened`."""
        yield self

    def saved(self, owner: str) -> SavedState | None:
        """The last state of an owner, from a context or from the cache; UsageError if the pool is closed."""
        self._check_open()
        states = [context.saved() for context in self._held(owner)]
        return states[0] if states else self.first.shared.cache.last(owner, self.first.shared.base)

    def identity_of(self, saved: SavedState) -> str:
        """A digest of everything that determines a state, including engine and files."""
        return self.first.identity_of(saved)

    def keep(self, saved: SavedState, owner: str) -> None:
        """Cache a state for an owner."""
        self.first.shared.cache.put(saved, owner)

    def load(self, entry: AdapterEntry, path: Path, fingerprint: str) -> None:
        """Check an adapter's file and load it."""
        self.first.engine.load_adapter(entry.name, path, fingerprint, entry.invocation)

    def unload(self, name: str) -> None:
        """Free an adapter that no call uses."""
        self.first.engine.unload_adapter(name)

    def drop_adapter(self, name: str) -> None:
        """Drop all states of an adapter that was removed, in contexts, in the cache and on disk."""
        for context in [context for context in self.contexts if context.depends_on(name)]:
            context.acquire()
            try:
                # A call that held it until now may have other adapters.
                if not context.closed and context.depends_on(name):
                    context.reset()
            finally:
                context.release()
        self.first.shared.forget_adapter(name)

    def drop_states(self, owner: str) -> None:
        """Drop the states of an owner, in contexts and in the cache; a closed pool has none."""
        if self._is_closed:
            return
        for context in self._held(owner):
            context.reset()
        # Last, because another call that takes the owner's context puts its state there.
        self.first.shared.cache.drop_states(owner)

    def clear(self) -> None:
        """Drop all sequences and cached states, except those on disk."""
        self._check_open()
        for context in self._held():
            context.clear()

    def close(self) -> None:
        """Free everything once no other thread runs a call, makes a context or uses the tokenizer.

        A second call does nothing.

        Calls that wait for a context and later ones raise UsageError. A stream that this thread read last, or one that
        has ended, ends with an error.
        """
        gate = self.places.gate
        with gate:
            self._is_closed = True
            self.places.changed.notify_all()
            while self._uses or any(_is_in_use(context) for context in self.contexts):
                # A thread whose stream is suspended may end.
                self.places.changed.wait(POLL_S)
            contexts, self._contexts = self.contexts, [self.first]
            for context in contexts:
                context.closed = True
            self.places.forks = [fork for fork in self.places.forks if fork not in contexts]
        # The first one last, because the others use its base.
        for context in reversed(contexts):
            context.engine.close()

    def _acquire(self, job: PromptJob, holder: Holder) -> Context:
        """A free context, held, or a new one. Calls that hold it for a moment make even a call with a place wait."""
        gate, patience = self.places.gate, Patience()
        while True:
            with gate:
                self._check_open()
                contexts = self._contexts = self.contexts
                free = [context for context in contexts if context.holder is None]
                if free:
                    context = max(free, key=lambda context: context.reusable_tokens(job))
                    context.holder = holder
                    return context
                makes_one = self.places.may_fork(holder)
                if makes_one:
                    self._uses.add(holder)
                else:
                    patience.check(context.holder for context in contexts if context.holder is not None)
                    self.places.changed.wait(POLL_S)
            if makes_one:
                self._fork(holder)
            job.check()

    def _fork(self, holder: Holder) -> None:
        """Make a context, without the gate, while it counts as a use; without memory calls wait for those there are."""
        made: Context | Exception
        try:
            made = self.first.fork()
        except (EdgetuneError, MemoryError) as error:
            made = error
        with self.places.gate:
            self._uses.discard(holder)
            if isinstance(made, Context):
                self._contexts.append(made)
                _LOG.debug("created context %d of its model", len(self._contexts))
            self.places.forked(made)

    def _held(self, owner: str | None = None) -> Iterator[Context]:
        """The contexts, or those whose sequence is an owner's, each held while it is looked at."""
        for context in self.contexts:
            if owner in (None, context.owner):
                context.acquire()
                try:
                    # A call that held it until now may have made it its own, or another model needed its memory.
                    if not context.closed and owner in (None, context.owner):
                        yield context
                finally:
                    context.release()

    def _check_open(self) -> None:
        self.places.check_open()
        if self._is_closed:
            raise UsageError(*CLOSED)


def _is_in_use(context: Context) -> bool:
    """Whether a call holds the context, other than a suspended stream of this thread."""
    holder = context.holder
    return holder is not None and not (holder.is_suspended and holder.is_of_this_thread)
