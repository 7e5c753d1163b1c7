"""Loads adapters at their first use, and drops the least recently used ones when their memory is short."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.threads.machine import free_mb
from edgetune_runtime.wording import CLOSED

from .context import Context
from .jobs import PromptJob
from .places import Holder, Patience, Places
from .pool import Pool
from .turns import POLL_S

Entries = Mapping[str, AdapterEntry]


class RemovedAdapterError(NotFoundError):
    """An adapter was removed or replaced after a call was prepared, and before it began."""


@dataclass
class _Loaded:
    bytes: int
    is_pinned: bool = False
    users: set[Holder] = field(default_factory=set)


class AdapterLoader(Protocol):
    """How an adapter's files get into an engine and out of it, and the bytes that they take in memory."""

    def load(self, entry: AdapterEntry, /) -> None:
        """Load an adapter."""

    def unload(self, name: str, /) -> None:
        """Drop one from memory, if it is there."""

    def bytes_of(self, entry: AdapterEntry, /) -> int:
        """The bytes that one takes while it is loaded."""


class LoadedAdapters:
    """The adapters that are loaded, of up to `limit_mb` (10^6 bytes) in total, or what memory is free. Thread-safe.

    `current` gives the adapters that there are: one that was removed or replaced since a call was prepared is refused.
    No lock is held while an adapter is loaded; one is loaded at a time. Calls with adapters that are there do not wait.
    With `is_soft`, one that does not fit is loaded all the same, after those that no call uses were dropped. Room is
    made by the sizes of adapters and before one is loaded, also if its file then proves to be damaged.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        current: Callable[[], Entries],
        limit_mb: float | None,
        *,
        is_soft: bool = False,
    ) -> None:
        self._loader, self._current = loader, current
        self._limit_mb, self._is_soft = limit_mb, is_soft
        # Not entered through the condition, as in `Places`.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # The least recently used first.
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._changer: Holder | None = None
        """What loads or unloads adapters."""
        self._is_closed = False

    @property
    def names(self) -> list[str]:
        """The names of the adapters that are loaded, the least recently used first."""
        with self._lock:
            return list(self._loaded)

    @contextmanager
    def use(self, entries: Entries, holder: Holder, check: Callable[[], None] = no_limits) -> Iterator[None]:
        """Load what is missing of these adapters, and keep them until the block ends.

        Where adapters that other calls use leave no room, it waits for them, until `check` raises. NotFoundError for an
        adapter that was removed, IncompatibleError for adapters that exceed the limit by themselves, UsageError when it
        would wait for streams of this thread alone, and what loading raises.
        """
        with self._releasing(holder):
            self._acquire(entries, holder, check)
            yield

    @contextmanager
    def use_loaded(self) -> Iterator[list[str]]:
        """Keep the adapters that are loaded until the block ends, and give their names."""
        holder = Holder()
        with self._releasing(holder):
            with self._lock:
                for loaded in self._loaded.values():
                    loaded.users.add(holder)
                names = self.names
            yield names

    @contextmanager
    def lease(self, pool: Pool | MergedPool, job: PromptJob, entries: Entries) -> Iterator[Context]:
        """Lease a context for a job with these adapters; errors as those of `Places.enter`, `use` and `Pool.take`."""
        with (
            pool.places.enter(job.check) as holder,
            self.use(entries, holder, job.check),
            pool.take(job, holder) as context,
        ):
            yield context

    def pin(self, entries: Entries) -> None:
        """Load adapters and never drop them for others; same errors as `use`."""
        with self.use(entries, Holder()), self._lock:
            for name in entries:
                self._loaded[name].is_pinned = True

    def require_room(self, sizes: Mapping[str, int]) -> None:
        """Raise IncompatibleError for adapters of these bytes that exceed the limit beside those that are pinned."""
        with self._lock:
            pinned = {name: loaded.bytes for name, loaded in self._loaded.items() if loaded.is_pinned}
        total_mb = sum((pinned | dict(sizes)).values()) / 1e6
        if self._limit_mb is not None and total_mb > self._limit_mb:
            beside = " beside those that are preloaded" if pinned.keys() - sizes.keys() else ""
            names = " and ".join(map(repr, sizes))
            message = f"adapters_mb is {self._limit_mb:g}, and {names}{beside} need {total_mb:.1f} MB"
            raise IncompatibleError(message, "open the bundle with a larger adapters_mb")

    def remove(self, name: str) -> None:
        """Unload an adapter that `current` has no more, once running calls do not use it.

        UsageError if only streams of this thread use it.
        """
        patience, changer = Patience(), Holder()
        with self._releasing(changer):
            with self._lock:
                while self._changer or (name in self._loaded and self._loaded[name].users):
                    if not self._changer:
                        patience.check(self._loaded[name].users)
                    self._changed.wait(POLL_S)
                if self._loaded.pop(name, None) is None:
                    return
                self._changer = changer
            self._change([name])

    def close(self) -> None:
        """Refuse all calls from now on, also those that wait, and wait until none loads an adapter."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
            while self._changer:
                self._changed.wait()

    def _acquire(self, entries: Entries, holder: Holder, check: Callable[[], None]) -> None:
        patience = Patience()
        while True:
            with self._lock:
                self._check_current(entries)
                missing = next((entry for name, entry in entries.items() if name not in self._loaded), None)
                if missing is None:
                    for name in entries:
                        self._loaded.move_to_end(name)
                        self._loaded[name].users.add(holder)
                    return
                if not self._is_soft:
                    self.require_room({name: self._loader.bytes_of(entry) for name, entry in entries.items()})
                victims = None if self._changer else self._victims(missing, entries)
                if victims is None:
                    if not self._changer:
                        patience.check(user for loaded in self._loaded.values() for user in loaded.users)
                    self._changed.wait(POLL_S)
                else:
                    self._changer = holder
                    for name in victims:
                        del self._loaded[name]
            if victims is None:
                check()
            else:
                self._change(victims, missing)

    def _change(self, victims: Sequence[str], entry: AdapterEntry | None = None) -> None:
        """Unload adapters, then load one, while `_changer` keeps others from it."""
        for name in victims:
            self._loader.unload(name)
        loaded = {}
        if entry is not None:
            try:
                self._loader.load(entry)
                loaded[entry.name] = _Loaded(self._loader.bytes_of(entry))
            except BaseException:
                # The engine may have loaded it before its file proved to be another one.
                self._loader.unload(entry.name)
                raise
        with self._lock:
            self._changer = None
            self._loaded.update(loaded)
            self._changed.notify_all()

    def _victims(self, missing: AdapterEntry, kept: Entries) -> list[str] | None:
        """The adapters to drop for one that is missing beside those that are `kept`; None if there is no room yet."""
        excess = self._loader.bytes_of(missing) - self._room()
        victims = []
        for name, loaded in self._loaded.items():
            if excess <= 0:
                break
            if not loaded.users and not loaded.is_pinned and name not in kept:
                victims.append(name)
                excess -= loaded.bytes
        return victims if excess <= 0 or self._is_soft else None

    def _room(self) -> float:
        """The bytes that are left."""
        if self._limit_mb is not None:
            return self._limit_mb * 1e6 - sum(loaded.bytes for loaded in self._loaded.values())
        free = free_mb()
        return math.inf if free is None else free * 1e6

    @contextmanager
    def _releasing(self, holder: Holder) -> Iterator[None]:
        """Release after the block what the holder uses or changes then, as after Ctrl-C."""
        try:
            yield
        finally:
            with self._lock:
                for loaded in self._loaded.values():
                    loaded.users.discard(holder)
                if self._changer is holder:
                    self._changer = None
                self._changed.notify_all()

    def _check_current(self, entries: Entries) -> None:
        if self._is_closed:
            raise UsageError(*CLOSED)
        current = self._current()
        for name, entry in entries.items():
            if current.get(name) is not entry:
                raise RemovedAdapterError(f"adapter {name!r} was removed before the call began", "call again")


@dataclass(frozen=True)
class MergedPool:
    """The contexts of a merged adapter: those of its own model in `pools`, which is open while `models` has it loaded.

    All models share the `places` of calls.
    """

    entry: AdapterEntry
    places: Places
    models: LoadedAdapters
    pools: Mapping[str, Pool]

    @property
    def first(self) -> Context:
        """The model's first context, for measurements that need no other model."""
        with self.opened() as pool:
            return pool.first

    @contextmanager
    def take(self, job: PromptJob, holder: Holder) -> Iterator[Context]:
        """Like `Pool.take`, on the merged model, which is opened if it is not open."""
        name = self.entry.name
        with self.models.use({name: self.entry}, holder, job.check), self.pools[name].take(job, holder) as context:
            yield context

    @contextmanager
    def opened(self) -> Iterator[Pool]:
        """The model's pool, which is not closed for others until the block ends."""
        with self.models.use({self.entry.name: self.entry}, Holder()):
            yield self.pools[self.entry.name]
