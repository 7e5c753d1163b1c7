"""Tokens and adapters in, reusable state out: which keys and values may stand in for a computation. No engine here.

Keys and values depend on the base, on the exact set of active adapters with their scales, and on the tokens. A state is
reused only as far as all of these match, so no adapter's state can ever shape another's answer.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from .batches import common_place

Active = tuple[tuple[str, float], ...]
"""Adapters with their scales, in order of their names."""

Place = tuple[str, tuple[Active, ...]]

_LOG = logging.getLogger(__name__)

CALLS = ""
"""Owner of what calls without a session leave: the last state of each set of adapters."""
PROMPTS = "prompts"
"""Owner of the states of fixed prompts, which anyone may read."""


@dataclass(frozen=True)
class Key:
    """What shapes a state besides its tokens: the base, and in each span, which begins at a token, the adapters."""

    base: str
    spans: tuple[tuple[int, Active], ...]

    def until(self, end: int) -> Key:
        """The key of the first `end` tokens alone."""
        first, *rest = self.spans
        return Key(self.base, (first, *(span for span in rest if span[0] < end)))


@dataclass(frozen=True)
class SavedState:
    """An engine's state of a sequence of tokens, and where the batches of a prompt that made its beginning ended."""

    key: Key
    tokens: tuple[int, ...]
    state: memoryview
    ends: tuple[int, ...] = ()


def key_of(base: str, spans: Iterable[tuple[int, Mapping[str, float]]]) -> Key:
    """The key of a base (its fingerprint) with adapters from a token on, the first span from the first token on.

    Order and adapters of scale 0 make no difference, nor does a span that changes nothing or ends where it begins.
    """
    found: list[tuple[int, Active]] = []
    for since, adapters in spans:
        active = tuple(sorted((name, float(scale)) for name, scale in adapters.items() if scale != 0))
        if found and found[-1][0] >= since:
            found.pop()
        if not found or found[-1][1] != active:
            found.append((since, active))
    return Key(base, tuple(found))


def reusable(state: tuple[Key, Sequence[int]], wanted: tuple[Key, Sequence[int]]) -> int:
    """Up to which token a state, given as its key and its tokens, is that of the wanted key and tokens."""
    (key, tokens), (other, others) = state, wanted
    if key.base != other.base:
        return 0
    shared = common_prefix(tokens, others)
    for mine, theirs in zip_longest(key.spans, other.spans):
        if mine != theirs:
            return min(shared, *(span[0] for span in (mine, theirs) if span is not None))
    return shared


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both sequences begin with."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _place(key: Key, owner: str) -> Place:
    return owner, tuple(active for _, active in key.spans)


class StateCache:
    """Saved states, at most `budget_mb` (10^6 bytes) in all; of each owner the last one of each set of adapters.

    An owner sees its own states and those of fixed prompts. Where adapters join later than at the first token, it makes
    no other set when they do. Safe to use from several threads.
    """

    def __init__(self, budget_mb: float) -> None:
        self._budget = int(budget_mb * 1e6)
        self._states: OrderedDict[Place, SavedState] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def admits(self, size: int) -> bool:
        """Whether a state of so many bytes could be kept at all."""
        return size <= self._budget

    def put(self, saved: SavedState, owner: str = CALLS) -> None:
        """Keep a state in place of the owner's last one of its adapters, dropping others where room is needed."""
        place = _place(saved.key, owner)
        with self._lock:
            self._drop(place)
            if self._make_room(len(saved.state), owner):
                self._states[place] = saved
                self.bytes += len(saved.state)

    def prompt(self, key: Key, tokens: Sequence[int]) -> memoryview | None:
        """The state of exactly this fixed prompt, which counts as use."""
        place = _place(key, PROMPTS)
        with self._lock:
            saved = self._states.get(place)
            if saved is None or (saved.key, saved.tokens) != (key, tuple(tokens)):
                return None
            self._states.move_to_end(place)
            return saved.state

    def last(self, owner: str) -> SavedState | None:
        """What was kept last of an owner."""
        with self._lock:
            return next((saved for place, saved in reversed(self._states.items()) if place[0] == owner), None)

    def best(
        self, key: Key, tokens: Sequence[int], owner: str = CALLS, places: Sequence[int] | None = None
    ) -> tuple[SavedState | None, int]:
        """The state of which most can be reused for these tokens, which counts as use, and up to which token.

        `places` is where the tokens are cut into batches: of what is not a session's own, no more is reused than what
        was cut alike.
        """
        with self._lock:
            best, most = None, 0
            for place, saved in self._states.items():
                if place[0] not in (owner, PROMPTS):
                    continue
                reused = reusable((saved.key, saved.tokens), (key, tokens))
                if places is not None and place[0] in (CALLS, PROMPTS):
                    reused = common_place(saved.ends, places, reused)
                if reused > most:
                    best, most = place, reused
            if best is None:
                return None, 0
            self._states.move_to_end(best)
            return self._states[best], most

    def forget(self, owner: str) -> None:
        """Drop all states of an owner."""
        with self._lock:
            for place in [place for place in self._states if place[0] == owner]:
                self._drop(place)

    def clear(self) -> None:
        """Drop all states."""
        with self._lock:
            self._states.clear()
            self.bytes = 0

    def _make_room(self, size: int, owner: str) -> bool:
        """Drop what was longest unused until so many bytes are free; whether they are.

        What calls leave goes first, and never pushes out others: it is the cheapest to make again.
        """
        order = [place for place in self._states if place[0] == CALLS]
        if owner != CALLS:
            order += [place for place in self._states if place[0] != CALLS]
        for place in order:
            if self.bytes + size <= self._budget:
                break
            evicted = self._states[place]
            _LOG.debug("evicted a state of %d tokens, %.1f MB", len(evicted.tokens), len(evicted.state) / 1e6)
            self._drop(place)
        return self.bytes + size <= self._budget

    def _drop(self, place: Place) -> None:
        dropped = self._states.pop(place, None)
        if dropped is not None:
            self.bytes -= len(dropped.state)
