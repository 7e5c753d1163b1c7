"""Adapters and tokens in, logits out: one engine with its live sequence, which it reuses only where that is exact."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .cache import Key, StateCache, common_prefix, key_of
from .engines._base import Engine, Logits
from .errors import UsageError


@dataclass(frozen=True)
class Start:
    """Logits after a prompt, and what they took: `reused` tokens were not computed anew."""

    logits: Logits
    reused: int
    switch_us: float


class Session:
    """An engine, the base that it runs (by fingerprint) and the states saved of it. Every use is inside `hold`."""

    def __init__(self, engine: Engine, base: str, cache: StateCache, kv_bytes_per_token: int) -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self._base = base
        self._key: Key | None = None
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
        try:
            key = key_of(self._base, adapters)
            reused = self._reuse(key, tokens)
            begin = time.perf_counter_ns()
            self.engine.activate(dict(key.adapters))
            switch_us = (time.perf_counter_ns() - begin) / 1e3
            self._key = key
            logits = self.engine.decode(tokens[reused:])
            self.tokens = list(tokens)
        except BaseException:
            self.reset()
            raise
        return Start(logits, reused, switch_us)

    def extend(self, tokens: Sequence[int]) -> Logits:
        """Decode more tokens; logits after each, shape [tokens, vocab]."""
        self._check_open()
        try:
            logits = self.engine.decode_all(tokens)
            self.tokens.extend(tokens)
        except BaseException:
            # A decode that was interrupted may have left its tokens or not.
            self.reset()
            raise
        return logits

    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return len(self.tokens) >= self.engine.context_length

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

    def _reuse(self, key: Key, tokens: Sequence[int]) -> int:
        """Bring the engine's sequence to the longest known beginning of `tokens`, one token short of all at most."""
        same = key == self._key
        known = common_prefix(self.tokens, tokens) if same else 0
        saved = self._cache.get(key)
        if not same:
            self._save()
        restored = common_prefix(saved.tokens, tokens) if saved else 0
        if saved and restored > known:
            self.engine.restore_state(saved.state)
            known = restored
        # At least one token is decoded: a state has no logits.
        keep = self.engine.forget(min(known, len(tokens) - 1))
        self.tokens = list(tokens[:keep])
        return keep

    def _save(self) -> None:
        if self._key and self.tokens and self._cache.admits(len(self.tokens) * self._kv_bytes_per_token):
            self._cache.put(self._key, self.tokens, self.engine.save_state())
