"""Tokens and adapters in, reusable state out: which keys and values may stand in for a computation. No engine here.

Keys and values depend on the base, on the exact set of active adapters with their scales, and on the tokens. A state is
reused only as far as all of these match, so no adapter's state can ever shape another's answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Key:
    """What shapes a state besides its tokens: `adapters` from the first token on, from token `since` on `then`."""

    base: str
    adapters: tuple[tuple[str, float], ...]
    then: tuple[tuple[str, float], ...] = ()
    since: int = 0


@dataclass(frozen=True)
class SavedState:
    """An engine's state of a sequence of tokens."""

    key: Key
    tokens: tuple[int, ...]
    state: bytes


def key_of(base: str, adapters: Mapping[str, float], then: Mapping[str, float] | None = None, since: int = 0) -> Key:
    """The key of a base (its fingerprint) with these adapters, and with others from a token on that is not the first.

    Order and adapters of scale 0 make no difference.
    """
    first, second = (
        tuple(sorted((name, float(scale)) for name, scale in which.items() if scale != 0))
        for which in (adapters, adapters if then is None else then)
    )
    return Key(base, first) if first == second else Key(base, first, second, since)


def reusable(state: tuple[Key, Sequence[int]], wanted: tuple[Key, Sequence[int]]) -> int:
    """Up to which token a state, given as its key and its tokens, is that of the wanted key and tokens."""
    (key, tokens), (other, others) = state, wanted
    shared = common_prefix(tokens, others)
    if key == other:
        return shared
    if (key.base, key.adapters) != (other.base, other.adapters):
        return 0
    return min(shared, *(one.since for one in (key, other) if one.then))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both sequences begin with."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


class StateCache:
    """The last saved state of each set of adapters, at most `budget_mb` (10^6 bytes) in all.

    Where adapters join later than at the first token, it makes no other set when they do. The longest unused goes
    first.
    """

    def __init__(self, budget_mb: float) -> None:
        self._budget = int(budget_mb * 1e6)
        self._states: OrderedDict[Key, SavedState] = OrderedDict()
        self.bytes = 0

    def admits(self, size: int) -> bool:
        """Whether a state of so many bytes could be kept at all."""
        return size <= self._budget

    def put(self, key: Key, tokens: Sequence[int], state: bytes) -> None:
        """Keep a state in place of the last one of its adapters, dropping others where room is needed."""
        place = replace(key, since=0)
        self._drop(place)
        if not self.admits(len(state)):
            return
        while self.bytes + len(state) > self._budget:
            self._drop(next(iter(self._states)))
        self._states[place] = SavedState(key, tuple(tokens), state)
        self.bytes += len(state)

    def best(self, key: Key, tokens: Sequence[int]) -> tuple[SavedState | None, int]:
        """The state of which most can be reused for these tokens, which counts as use, and up to which token."""
        found: SavedState | None = None
        most = 0
        for saved in self._states.values():
            reused = reusable((saved.key, saved.tokens), (key, tokens))
            if reused > most:
                found, most = saved, reused
        if found is not None:
            self._states.move_to_end(replace(found.key, since=0))
        return found, most

    def clear(self) -> None:
        """Drop all states."""
        self._states.clear()
        self.bytes = 0

    def _drop(self, place: Key) -> None:
        dropped = self._states.pop(place, None)
        if dropped is not None:
            self.bytes -= len(dropped.state)
