"""Adapters and tokens in, logits out: one engine with its live sequence, which it reuses only where that is exact."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from .activation import Invocations, Phases, phases
from .cache import Key, StateCache, key_of, reusable
from .engines._base import Engine, Logits
from .errors import UsageError


@dataclass(frozen=True)
class Start:
    """Logits after a prompt, and what they took: `reused` tokens were not computed anew."""

    logits: Logits
    reused: int
    switch_us: float


class Session:
    """An engine, the base that it runs (by fingerprint) and the states saved of it. Every use is inside `hold`.

    `invocations` are the tokens from which on some adapters act, and not before.
    """

    def __init__(
        self,
        engine: Engine,
        base: str,
        cache: StateCache,
        kv_bytes_per_token: int,
        invocations: Invocations = MappingProxyType({}),
    ) -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self._base = base
        self._key: Key | None = None
        self._room = engine.capacity({})
        self._invocations = invocations
        self._cache = cache
        self._kv_bytes_per_token = kv_bytes_per_token
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._closed = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other threads out; UsageError when this very thread has a stream open, as waiting would never end."""
        if self._holder == threading.get_ident():
            raise UsageError("a stream of this thread is still open", "read it to its end or close it first")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                self._check_open()
                yield
            finally:
                self._holder = None

    def start(self, adapters: Mapping[str, float], tokens: Sequence[int]) -> Start:
        """Switch to these adapters and decode the tokens, all but what is known of their beginning."""
        acting = phases(adapters, self._invocations, tokens)
        with self._resetting():
            reused, switch_ns = self._begin(acting, tokens)
            if reused < acting.since:
                switch_ns += self._activate(acting.first)
                self.engine.decode(tokens[reused : acting.since])
                switch_ns += self._activate(acting.then)
            logits = self.engine.decode(tokens[max(reused, acting.since) :])
            self.tokens = list(tokens)
        return Start(logits, reused, switch_ns / 1e3)

    def walk(self, adapters: Mapping[str, float], tokens: Sequence[int], rows: int) -> Iterator[Logits]:
        """As `start`, but gives logits after each of the tokens, at most so many rows at once."""
        acting = phases(adapters, self._invocations, tokens)
        with self._resetting():
            # The first token is decoded in any case: a state has no logits.
            self._begin(acting, tokens[:1])
        for begin, end in _parts(len(tokens), acting.since, rows):
            self._activate(acting.first if begin < acting.since else acting.then)
            yield self.extend(tokens[begin:end])

    def extend(self, tokens: Sequence[int]) -> Logits:
        """Decode more tokens; logits after each, shape [tokens, vocab]."""
        self._check_open()
        with self._resetting():
            logits = self.engine.decode_all(tokens)
            self.tokens.extend(tokens)
        return logits

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """How many tokens fit in the context with these adapters, prompt and answer together."""
        return self.engine.capacity(adapters)

    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return len(self.tokens) >= self._room

    def clear(self) -> None:
        """Forget the live sequence and all saved states."""
        self.reset()
        self._cache.clear()

    def reset(self) -> None:
        """Forget the live sequence."""
        self.tokens = []
        self._key = None
        self.engine.forget(0)

    def close(self) -> None:
        """Free the engine, after other threads' calls have ended; a stream of this thread ends with an error."""
        mine = self._holder == threading.get_ident()
        if not mine:
            self._lock.acquire()
        try:
            self._closed = True
            self._cache.clear()
            self.engine.close()
        finally:
            if not mine:
                self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the runtime is closed", "open the bundle again")

    @contextmanager
    def _resetting(self) -> Iterator[None]:
        """Forget the live sequence when something goes wrong: an interrupted decode may have left its tokens or not."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def _begin(self, acting: Phases, tokens: Sequence[int]) -> tuple[int, int]:
        """Bring the engine's sequence to the longest known beginning of `tokens`, one token short of all at most.

        What acts in the end is active then. Returns the beginning's tokens, and the nanoseconds that the switch took.
        """
        key = key_of(self._base, acting.first, acting.then, acting.since)
        live = reusable((self._key, self.tokens), (key, tokens)) if self._key else 0
        # Looked up before anything is saved, which may drop it.
        saved, known = self._cache.best(key, tokens)
        if key != self._key:
            self._save()
        # Of another prefix nothing may be left, and a state is restored behind its own.
        switch_ns = self._activate(acting.then)
        self._key, self._room = key, self.engine.capacity(acting.then)
        if saved is not None and known > live:
            self.engine.restore_state(saved.state)
            live = known
        keep = self.engine.forget(min(live, len(tokens) - 1))
        self.tokens = list(tokens[:keep])
        return keep, switch_ns

    def _activate(self, adapters: Mapping[str, float]) -> int:
        """Switch; returns the nanoseconds that it took."""
        active = {name: scale for name, scale in sorted(adapters.items()) if scale != 0}
        begin = time.perf_counter_ns()
        self.engine.activate(active)
        return time.perf_counter_ns() - begin

    def _save(self) -> None:
        if self._key and self.tokens and self._cache.admits(len(self.tokens) * self._kv_bytes_per_token):
            self._cache.put(self._key, self.tokens, self.engine.save_state())


def _parts(count: int, since: int, rows: int) -> Iterator[tuple[int, int]]:
    """Cut a row of tokens into parts of at most so many, and at `since`."""
    for begin, end in ((0, since), (since, count)):
        yield from ((start, min(start + rows, end)) for start in range(begin, end, rows))
