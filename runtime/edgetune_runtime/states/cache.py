"""Prefix cache in memory: finds the saved state with the longest reusable prefix.

Keys and values depend on the base, on the exact set of active adapters with their scales, and on the tokens. A state is
reused only where all of these match, so the state of one adapter never affects the answer of another.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from edgetune_runtime.events import Emit, Event, ignore

from .batches import common_boundary

Active = tuple[tuple[str, float], ...]
"""Adapters with their scales, sorted by name."""

Slot = tuple[str, str, tuple[Active, ...], tuple[int, ...]]
"""The owner of a state, its base, its sets of adapters, and the tokens of a fixed prompt; a slot has one state."""

_LOG = logging.getLogger(__name__)

CACHE_MB = 128
"""Memory limit of saved states by default, in MB (10^6 bytes)."""

CALLS = ""
"""Owner of the states of calls without a session: the last state of each set of adapters."""
PROMPTS = "prompts"
"""Owner of the states of fixed prompts, which all owners may reuse."""
FROM_CALL = "from call"
"""Owner of the states of fixed prompts that came with one call so far: reused by all, and evicted before others."""

_SHARED = (PROMPTS, FROM_CALL)


@dataclass(frozen=True)
class Key:
    """What determines a state besides its tokens: the base, and the start and the adapters of each span."""

    base: str
    spans: tuple[tuple[int, Active], ...]

    def until(self, end: int) -> Key:
        """The key of the first `end` tokens alone."""
        first, *rest = self.spans
        return Key(self.base, (first, *(span for span in rest if span[0] < end)))


@dataclass(frozen=True)
class SavedState:
    """An engine's state of a sequence of tokens, and the ends of the batches that computed its prompt."""

    key: Key
    tokens: tuple[int, ...]
    state: memoryview
    ends: tuple[int, ...] = ()


def key_of(base: str, spans: Iterable[tuple[int, Mapping[str, float]]]) -> Key:
    """The key of a base (its fingerprint) and spans of adapters, each given with its start; the first start is 0.

    The order of adapters, adapters of scale 0, empty spans, and spans that change nothing make no difference.
    """
    merged: list[tuple[int, Active]] = []
    for start, adapters in spans:
        active = tuple(sorted((name, float(scale)) for name, scale in adapters.items() if scale != 0))
        if merged and merged[-1][0] >= start:
            merged.pop()
        if not merged or merged[-1][1] != active:
            merged.append((start, active))
    return Key(base, tuple(merged))


def name_of(adapters: str | Mapping[str, float] | None) -> str:
    """Adapters as one name, with the scales other than 1; `base` for none."""
    if isinstance(adapters, str):
        return adapters
    names = (name if scale == 1 else f"{name}={scale:g}" for name, scale in (adapters or {}).items())
    return " ".join(names) or "base"


def reusable(state: tuple[Key, Sequence[int]], prompt: tuple[Key, Sequence[int]]) -> int:
    """The length of the prefix that a state has in common with a prompt, each given as key and tokens."""
    (key, tokens), (other, others) = state, prompt
    if key.base != other.base:
        return 0
    for span, other_span in zip_longest(key.spans, other.spans):
        if span != other_span:
            end = min(each[0] for each in (span, other_span) if each is not None)
            return common_prefix(tokens[:end], others[:end])
    return common_prefix(tokens, others)


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the common prefix of two sequences of tokens, or of characters."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _slot(key: Key, owner: str, tokens: Sequence[int]) -> Slot:
    return owner, key.base, tuple(active for _, active in key.spans), tuple(tokens) if owner in _SHARED else ()


class StateCache:
    """Saved states of up to `budget_mb` (10^6 bytes) in total: for each owner, the last state of each set of adapters
    on each base.

    An owner can reuse its own states and those of fixed prompts, of which there may be several per set of adapters. Two
    states whose adapters differ only in the token where they become active count as the same set. Thread-safe.
    """

    def __init__(self, budget_mb: float, emit: Emit = ignore) -> None:
        self._budget, self._emit = budget_mb * 1e6, emit
        self._states: OrderedDict[Slot, SavedState] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def admits(self, size: int) -> bool:
        """Whether a state of `size` bytes fits in the budget."""
        return size <= self._budget

    def put(self, saved: SavedState, owner: str = CALLS) -> None:
        """Cache a state in place of the owner's last state with the same adapters, evicting others if needed."""
        slot, size = _slot(saved.key, owner, saved.tokens), len(saved.state)
        with self._lock:
            self._drop(slot)
            if owner == PROMPTS:
                self._drop(_slot(saved.key, FROM_CALL, saved.tokens))
            evicted = self._evict(size, owner)
            if self.bytes + size <= self._budget:
                self._states[slot] = saved
                self.bytes += size
        # Without the lock: the app's callback may take long.
        for other in evicted:
            count, other_size = len(other.tokens), len(other.state)
            _LOG.debug("evicted a state of %d tokens, %.1f MB", count, other_size / 1e6)
            name = name_of(dict(other.key.spans[-1][1]))
            self._emit(Event("evicted", name, tokens=count, bytes=other_size))

    def prompt(self, key: Key, tokens: Sequence[int]) -> memoryview | None:
        """The state of exactly this fixed prompt, marked as recently used; None if there is none."""
        with self._lock:
            for slot in (_slot(key, owner, tokens) for owner in _SHARED):
                saved = self._states.get(slot)
                if saved is not None and saved.key == key:
                    self._states.move_to_end(slot)
                    return saved.state
        return None

    def last(self, owner: str, base: str) -> SavedState | None:
        """The most recently used state of an owner on a base."""
        with self._lock:
            return next((saved for slot, saved in reversed(self._states.items()) if slot[:2] == (owner, base)), None)

    def best(
        self,
        key: Key,
        tokens: Sequence[int],
        owner: str = CALLS,
        boundaries: Sequence[int] | None = None,
        *,
        whole: bool = False,
    ) -> tuple[SavedState | None, int]:
        """The state with the longest reusable prefix of these tokens, marked as recently used, and that length.

        With `boundaries`, where the tokens are split into batches, states that are not a session's own are reused only
        up to the last boundary in common. With `whole`, only states that are reused to their end are found. The last
        token is never reused, as a state has no logits.
        """
        with self._lock:
            best, longest = None, 0
            for slot, saved in self._states.items():
                if slot[0] not in (owner, *_SHARED):
                    continue
                reused = min(reusable((saved.key, saved.tokens), (key, tokens)), len(tokens) - 1)
                if boundaries is not None and slot[0] in (CALLS, *_SHARED):
                    reused = common_boundary(saved.ends, boundaries, reused)
                if whole and reused != len(saved.tokens):
                    continue
                if reused > longest:
                    best, longest = slot, reused
            if best is None:
                return None, 0
            self._states.move_to_end(best)
            return self._states[best], longest

    def drop_states(self, owner: str) -> None:
        """Drop all states of an owner."""
        with self._lock:
            for slot in [slot for slot in self._states if slot[0] == owner]:
                self._drop(slot)

    def drop_adapter(self, name: str, digest: str | None = None) -> None:
        """Drop all states that an adapter computed; its file's digest is the base of those of a merged one."""
        with self._lock:
            for slot in list(self._states):
                if slot[1] == digest or any(name in dict(active) for active in slot[2]):
                    self._drop(slot)

    def clear(self) -> None:
        """Drop all states."""
        with self._lock:
            self._states.clear()
            self.bytes = 0

    def _evict(self, size: int, owner: str) -> list[SavedState]:
        """Evict the least recently used states until `size` bytes fit, if they can; returns the evicted ones.

        States of calls are evicted first, then those of prompts that may not come again. Neither evicts others: they
        are the cheapest to recompute.
        """
        order = [slot for slot in self._states if slot[0] == CALLS]
        if owner != CALLS:
            order += [slot for slot in self._states if slot[0] == FROM_CALL]
        if owner not in (CALLS, FROM_CALL):
            order += [slot for slot in self._states if slot[0] not in (CALLS, FROM_CALL)]
        evicted = []
        for slot in order:
            if self.bytes + size <= self._budget:
                break
            evicted.append(self._states[slot])
            self._drop(slot)
        return evicted

    def _drop(self, slot: Slot) -> None:
        dropped = self._states.pop(slot, None)
        if dropped is not None:
            self.bytes -= len(dropped.state)
