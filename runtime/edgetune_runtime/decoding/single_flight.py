"""A single-flight cache: values are made once per key, without a lock held meanwhile; the last used are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from edgetune_runtime.limits import Stopped, no_limits

T = TypeVar("T")

_CHECK_S = 0.05


class SingleFlightCache(Generic[T]):
    """The `keep` last used values by key. Thread-safe: calls with a key wait for the one that makes it, others do not.

    An error is raised in all calls that waited for it, and not kept. If the call that makes the value is stopped, one
    of those that wait makes it.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._futures: OrderedDict[Hashable, Future[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._futures)

    def get(self, key: Hashable, make: Callable[[], T], check: Callable[[], None] = no_limits) -> T:
        """The value of this key, by `make` where there is none. Raises what `check` does, also while it waits."""
        while True:
            future, is_maker = self._future(key)
            if is_maker:
                self._make(key, future, make)
                return future.result()
            while not future.done():
                wait([future], _CHECK_S)
                check()
            if not isinstance(future.exception(), Stopped):
                return future.result()

    def _future(self, key: Hashable) -> tuple[Future[T], bool]:
        """The value of this key, and whether this call has to make it."""
        with self._lock:
            future = self._futures.get(key)
            is_maker = future is None
            if future is None:
                future = self._futures[key] = Future()
            self._futures.move_to_end(key)
            while len(self._futures) > self._keep:
                self._futures.popitem(last=False)
        return future, is_maker

    def drop(self, key: Hashable) -> None:
        """Have the next call make the value again."""
        with self._lock:
            self._futures.pop(key, None)

    def _make(self, key: Hashable, future: Future[T], make: Callable[[], T]) -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            with self._lock:
                if self._futures.get(key) is future:
                    del self._futures[key]
            future.set_exception(error)
