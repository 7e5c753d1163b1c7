"""Opens the models of merged adapters on demand, and closes unused ones when memory is short."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edgetune_runtime.errors import UsageError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.threads.machine import free_mb
from edgetune_runtime.wording import CLOSED

from .context import Context
from .jobs import PromptJob
from .places import Holder, Places
from .pool import Pool
from .turns import POLL_S

_LOG = logging.getLogger(__name__)

MakeRoom = Callable[[float], None]
"""Makes room for a model of this size in MB, just before it is loaded."""


@dataclass
class _Model:
    pool: Pool
    mb: float
    users: set[object] = field(default_factory=set)


class MergedModels:
    """The opened models, by adapter; `open_model` opens one. Thread-safe.

    Before a model is opened, those that no call uses are closed until it fits, the least recently used first: together
    they take at most `limit_mb`, by default what memory is free. Models that are in use stay. No lock is held while a
    model is opened; one is opened at a time. Calls on models that are open do not wait.
    """

    def __init__(self, open_model: Callable[[str, MakeRoom], Pool], limit_mb: float | None) -> None:
        self._open_model = open_model
        self._limit_mb = limit_mb
        # Not entered through the condition, as in `Places`.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._is_opening = self._is_closed = False

    @contextmanager
    def use(self, name: str, check: Callable[[], None] = no_limits) -> Iterator[Pool]:
        """The model of an adapter, opened if it is not, and not closed for others until the block ends.

        While it waits for another model to be opened, `check` may end that by raising. UsageError after `close`, and
        the errors of `open_model`.
        """
        user = object()
        try:
            yield self._acquire(name, user, check).pool
        finally:
            self._release(user)

    @contextmanager
    def use_opened(self) -> Iterator[dict[str, Pool]]:
        """The models that are open, by adapter, which are not closed for others until the block ends."""
        user = object()
        try:
            with self._lock:
                for model in self._models.values():
                    model.users.add(user)
                pools = {name: model.pool for name, model in self._models.items()}
            yield pools
        finally:
            self._release(user)

    def remove(self, name: str) -> None:
        """Close the model of an adapter that there is no more, once running calls do not use it."""
        with self._lock:
            while self._is_opening or (name in self._models and self._models[name].users):
                self._changed.wait(POLL_S)
            model = self._models.pop(name, None)
        if model is not None:
            model.pool.close()

    def close(self) -> None:
        """Close all models after the calls of other threads end; no other is opened from now on."""
        with self._lock:
            self._is_closed = True
            while self._is_opening:
                self._changed.wait()
            models = list(self._models.values())
        for model in models:
            model.pool.close()

    def _acquire(self, name: str, user: object, check: Callable[[], None]) -> _Model:
        with self._lock:
            while True:
                if self._is_closed:
                    raise UsageError(*CLOSED)
                if name in self._models:
                    self._models.move_to_end(name)
                    self._models[name].users.add(user)
                    return self._models[name]
                if not self._is_opening:
                    break
                self._changed.wait(POLL_S)
                check()
            self._is_opening = True
        try:
            return self._open(name, user)
        finally:
            with self._lock:
                self._is_opening = False
                self._changed.notify_all()

    def _open(self, name: str, user: object) -> _Model:
        needed_mb = 0.0

        def make_room(mb: float) -> None:
            nonlocal needed_mb
            needed_mb = mb
            while not self._fits(mb) and self._close_unused():
                pass

        model = _Model(self._open_model(name, make_room), needed_mb, {user})
        with self._lock:
            self._models[name] = model
        return model

    def _fits(self, mb: float) -> bool:
        if self._limit_mb is not None:
            return sum(model.mb for model in list(self._models.values())) + mb <= self._limit_mb
        free = free_mb()
        return free is None or mb <= free

    def _close_unused(self) -> bool:
        """Close the least recently used model that no call uses; False if there is none."""
        with self._lock:
            name = next((name for name, model in self._models.items() if not model.users), None)
            if name is None:
                return False
            model = self._models.pop(name)
        model.pool.close()
        _LOG.info("closed merged adapter %r, which no call uses, for lack of memory", name)
        return True

    def _release(self, user: object) -> None:
        with self._lock:
            for model in self._models.values():
                model.users.discard(user)
            self._changed.notify_all()


class MergedPool:
    """The contexts of a merged adapter: those of its own model; all models share the `places` of calls."""

    def __init__(self, name: str, places: Places, models: MergedModels) -> None:
        self._name, self.places, self._models = name, places, models

    @property
    def first(self) -> Context:
        """The model's first context, for measurements that need no other model."""
        with self._models.use(self._name) as pool:
            return pool.first

    @contextmanager
    def take(self, job: PromptJob, holder: Holder) -> Iterator[Context]:
        """Like `Pool.take`, on the merged model, which is opened if it is not open."""
        with self._models.use(self._name, job.check) as pool, pool.take(job, holder) as context:
            yield context

    @contextmanager
    def opened(self) -> Iterator[Pool]:
        """The model's pool, which is not closed for others until the block ends."""
        with self._models.use(self._name) as pool:
            yield pool
